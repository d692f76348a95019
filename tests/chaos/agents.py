"""Recipes of agents beside the learner, in sessions of its run: what a session records must stay what was sampled."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx

from learner.agents.trajectories import check_trajectory
from learner.rollouts.completions import AllowedVersion
from shared.errors import LockstepError
from shared.sessions import SessionOpened, SessionRecord, Trajectory
from tests.chaos import recipes
from tests.chaos.world import RUN_ID, NotInjectedError, World, ready
from tests.integration.support.server import HTTP

#: For a call, for what it leaves behind to be gone, and for pushes to come.
_CALL_S, _FREE_S, _PUSHES_S = 30.0, 15.0, 20.0
#: Answers that an agent may get while the learner is pushing, has started again, or has needed the session's slot.
_GIVEN_UP = (404, 409, 410, 429, 503)


class Agent:
    """Has one session, and remembers what the server said that the engine was asked and answered.

    Attributes:
        answers: token ids of prompt and answer, one for each choice of each call that was answered.
    """

    def __init__(self, world: World, server: int, **fields: Any) -> None:
        self._world, self.url = world, world.url(server)
        body = {"run_id": RUN_ID, "max_seconds": 120, **fields}
        answer = HTTP.post(f"{self.url}/v1/sessions", json=body, timeout=_CALL_S)
        if answer.status_code != 200:
            raise NotInjectedError(f"no session: {answer.status_code} {answer.text[:200]}")
        self.opened = SessionOpened.model_validate(answer.json())
        if self.opened.version is None:
            raise NotInjectedError("the session has no version")
        self.version = self.opened.version
        self.answers: list[tuple[list[int], list[int]]] = []
        self._messages: list[dict[str, str]] = []

    def call(self, **fields: Any) -> bool:
        """Say something; return False where the server takes no more of it."""
        self._messages.append({"role": "user", "content": f"question {len(self._messages)}"})
        answer = HTTP.post(self._chat, json=self._body(max_tokens=8, **fields), timeout=_CALL_S)
        if answer.status_code in _GIVEN_UP:
            return False
        self._require(answer.status_code == 200, f"a call gets {answer.status_code} {answer.text[:300]}")
        if answer.status_code != 200:
            return False
        document = answer.json()
        for choice in document["choices"]:
            self.answers.append((document["prompt_token_ids"], choice["token_ids"]))
        said = document["choices"][0]["message"]["content"] or ""
        self._messages.append({"role": "assistant", "content": said})
        return True

    @contextlib.contextmanager
    def streamed(self) -> Iterator[None]:
        """Begin a call that lasts; hang up at the end of the block."""
        ask = [{"role": "user", "content": "go on"}]
        body = self._body(stream=True, max_tokens=900, messages=ask)
        with HTTP.stream("POST", self._chat, json=body, timeout=_CALL_S) as stream:
            if stream.status_code != 200:
                raise NotInjectedError(f"no stream: {stream.status_code}")
            lines = stream.iter_lines()
            next(lines)
            yield

    def record(self) -> SessionRecord:
        """Return what is recorded."""
        answer = HTTP.get(f"{self.url}/v1/sessions/{self.opened.session_id}", timeout=_CALL_S)
        answer.raise_for_status()
        return SessionRecord.model_validate_json(answer.content)

    def check(self) -> SessionRecord:
        """Check that the record holds what was answered, each answer once, of versions that may answer; return it."""
        record, found = self.record(), list[tuple[list[int], list[int]]]()
        allowed = AllowedVersion(self.version, exact=False, carried=True)
        for trajectory in record.trajectories:
            try:
                check_trajectory(trajectory, allowed)
            except LockstepError as error:
                self._require(False, error.message)
                continue
            ids = trajectory.token_ids
            found += [(ids[:start], ids[start:end]) for start, end in trajectory.sampled]
            self._versions(trajectory)
        what = f"{len(self.answers)} answers, of which the record has {len(found)}, or others"
        self._require(sorted(found) == sorted(self.answers), what)
        return record

    def _versions(self, trajectory: Trajectory) -> None:
        first = (self.version.fence, self.version.step)
        before = [at - 1 for start, end in trajectory.sampled for at in range(start, end)]
        for span in trajectory.spans:
            assert span.version is not None
            version, part = (span.version.fence, span.version.step), slice(span.start, span.end)
            self._require(version >= first, f"{version} has answered in a session of {first}")
            self._world.checker.equal(version, trajectory.token_ids, trajectory.logprobs[part], before[part])

    @property
    def _chat(self) -> str:
        return f"{self.url}{self.opened.path}/chat/completions"

    def _body(self, **fields: Any) -> dict[str, Any]:
        return {"model": "any", "messages": self._messages, "return_token_ids": True, **fields}

    def _require(self, holds: bool, what: str) -> None:
        self._world.checker.require("sessions", holds, what)


def hang_up_and_stay_open(world: World, server: int, random: Random) -> None:
    """Leave in the middle of a streamed call: the engine is freed. Sessions of several versions stay open while pushes
    go on, and hold up none of them for long.
    """
    agent = Agent(world, server, sampling={"ignore_eos": True, "max_tokens": None})
    agent.call()
    with agent.streamed():
        time.sleep(random.uniform(0, 0.3))
    deadline = time.monotonic() + _FREE_S
    while agent.record().running and time.monotonic() < deadline:
        time.sleep(0.05)
    record = agent.record()
    ended = (record.running, record.cut) == (0, 1)
    world.checker.require("sessions", ended, f"of one call that was cut {record.running} go on, {record.cut} are cut")
    agents, first, deadline = [agent], _pushes(world, server), time.monotonic() + _PUSHES_S
    while (came := _pushes(world, server) - first) < 3 and time.monotonic() < deadline:
        if came == len(agents):
            agents.append(Agent(world, server, follow=came == 2))
        for each in agents:
            each.call(n=random.choice((1, 1, 2)))
        time.sleep(random.uniform(0, 0.2))
    if not came:
        raise NotInjectedError("no push came")
    for each in agents:
        each.check()


def use_token_elsewhere(world: World, server: int, random: Random) -> None:
    """Use a session's token for what is not the session's."""
    agent, other = Agent(world, server), Agent(world, server)
    agent.call()
    own, others = (f"/v1/sessions/{each.opened.session_id}" for each in (agent, other))
    run = f"/v1/runs/{RUN_ID}"
    elsewhere = [(method, path) for method in ("GET", "DELETE") for path in (own, others, run, "/v1/state")]
    elsewhere += [("POST", f"/v1/{name}") for name in ("drain", "generate", "score", "sessions")]
    elsewhere.append(("POST", f"{others}/v1/chat/completions"))
    for method, path in random.sample(elsewhere, 6):
        headers = {"Authorization": f"Bearer {agent.opened.token}"}
        status = HTTP.request(method, agent.url + path, headers=headers, json={"run_id": RUN_ID}).status_code
        world.checker.require("sessions", status in (401, 403), f"a session's token gets {status} of {method} {path}")
    agent.call()
    for each in (agent, other):
        each.check()


def kill_server(world: World, server: int, random: Random) -> None:
    """Kill the server with a call under way: its sessions are lost, and it says so."""
    agent = Agent(world, server, sampling={"ignore_eos": True, "max_tokens": None})
    with contextlib.suppress(httpx.HTTPError), agent.streamed():
        recipes.kill_server(world, server, random)
    if ready(world.url(server)):
        answer = HTTP.get(f"{agent.url}/v1/sessions/{agent.opened.session_id}", timeout=_CALL_S)
        said = f"a lost session gets {answer.status_code} {answer.text[:300]}"
        world.checker.require("sessions", "unknown_session" in answer.text, said)


def kill_learner(world: World, server: int, random: Random) -> None:
    """Kill the learner with a session open, which is left to the pushes of the one that starts again."""
    agent = Agent(world, server)
    agent.call()
    recipes.kill_learner(world, server, random)
    agent.call()
    agent.check()


def _pushes(world: World, server: int) -> int:
    return sum(receipt["server"] == server for receipt in world.control.receipts())
