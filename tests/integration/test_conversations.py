"""Many agents at once on a real engine: what is recorded, of which version, and what the learner makes of it."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from learner.agents.trajectories import episode_of
from learner.rollouts.completions import AllowedVersion
from learner.servers.client import RolloutClient
from shared.sessions import SessionOpened, SessionRecord
from shared.weights import WeightVersion
from tests.integration.support import policy as P
from tests.integration.support.waiting import until

RUN = "conversations"
CONVERSATIONS, CALLS, AT_ONCE = 200, 6, 16
AGENTS, PUSHES = 64, 3
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


Answer = tuple[list[int], list[int]]


class Agent:
    """Holds a conversation, and remembers what it was told that the engine was asked and answered.

    Attributes:
        answers: token ids of prompt and answer, one for each choice of each call.
        shaped: those with structured outputs, which draw from a cut distribution.
    """

    def __init__(self, http: httpx.AsyncClient, opened: SessionOpened, seed: int) -> None:
        self.opened, self._http, self._random = opened, http, random.Random(seed)
        self.answers: list[Answer] = []
        self.shaped: list[Answer] = []
        self.tool_calls = 0
        self._histories: list[list[dict[str, Any]]] = [[]]

    @classmethod
    async def begin(cls, http: httpx.AsyncClient, seed: int, **fields: Any) -> Agent:
        """Open a session."""
        answer = await http.post("/v1/sessions", json={"run_id": RUN, **fields})
        assert answer.status_code == 200, answer.text
        return cls(http, SessionOpened.model_validate(answer.json()), seed)

    async def converse(self, calls: int) -> None:
        """Make so many calls, some of them side by side."""
        while calls > 0:
            together = min(calls, self._random.choice((1, 1, 1, 2, 3)))
            await asyncio.gather(*(self.call() for _ in range(together)))
            calls -= together

    async def call(self) -> None:
        """Say something in one of the histories, which may have been cut, with or without tools, n, and a stream."""
        draw = self._random
        history = list(draw.choice(self._histories[-3:]))
        if draw.random() < 0.2:  # a turn that was taken back, or cut
            history = history[: draw.randrange(len(history) + 1)]
            if history:
                history[-1] = {**history[-1], "content": (history[-1].get("content") or "")[:5]}
        history.append(
            {"role": draw.choice(("user", "tool")), "content": f"{draw.randrange(100)} é?", "tool_call_id": "1"}
        )
        body = {"model": "any", "messages": history, "max_tokens": draw.randint(1, 8), "n": draw.choice((1, 1, 2))}
        body |= {"return_token_ids": True, "stream": draw.random() < 0.4}
        kind = draw.random()
        if (
            kind < 0.2
        ):  # made of other tokens than a tokenizer makes of it: the next prompt is built on the recorded ones
            body |= {"structured_outputs": {"regex": "([a-z]){8}"}, "max_tokens": 20}
        elif kind < 0.4:
            body |= {"tools": [TOOL], "structured_outputs": {"choice": [CALLED]}, "max_tokens": 100, "stream": False}
        answer = await self._http.post(f"{self.opened.path}/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        for prompt, token_ids, message in _streamed(answer.text) if body["stream"] else _whole(answer.json()):
            self.answers.append((prompt, token_ids))
            if "structured_outputs" in body:
                self.shaped.append((prompt, token_ids))
            self.tool_calls += bool(message.get("tool_calls"))
            self._histories.append([*history, {"role": "assistant", **message}])

    async def end(self) -> SessionRecord:
        """End the session, and check that its record is what was asked and answered, each once."""
        answer = await self._http.delete(f"/v1/sessions/{self.opened.session_id}")
        record = SessionRecord.model_validate_json(answer.content)
        found = []
        for trajectory in record.trajectories:
            ids = trajectory.token_ids
            found += [(ids[:start], ids[start:end]) for start, end in trajectory.sampled]
        assert sorted(found) == sorted(self.answers)
        return record


def _whole(document: dict[str, Any]) -> Iterator[tuple[list[int], list[int], dict[str, Any]]]:
    for choice in document["choices"]:
        told = {name: choice["message"].get(name) for name in ("content", "tool_calls") if choice["message"].get(name)}
        yield document["prompt_token_ids"], choice["token_ids"], {"content": "", **told}


def _streamed(text: str) -> Iterator[tuple[list[int], list[int], dict[str, Any]]]:
    prompt: list[int] = []
    found: dict[int, tuple[list[int], list[str]]] = {}
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        prompt = chunk.get("prompt_token_ids") or prompt
        for choice in chunk["choices"]:
            token_ids, texts = found.setdefault(choice["index"], ([], []))
            token_ids += choice.get("token_ids") or ()
            texts.append(choice["delta"].get("content") or "")
    for token_ids, texts in found.values():
        yield prompt, token_ids, {"content": "".join(texts)}


@contextmanager
def _pushed(client: RolloutClient, policy: Any) -> Iterator[WeightVersion]:
    P.randomize(policy, seed=5)
    yield P.push(client, policy, RUN, step=0).version
    client.delete_run(RUN, P.LEASE)


@torch.no_grad()
def _own_logprobs(policy: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Return ln p of tokens 1.. of each sequence, computed by Hugging Face in float32, in batches of like lengths."""
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for first in range(0, len(order), 64):
        rows = order[first : first + 64]
        longest = max(len(sequences[i]) for i in rows)
        ids_BT = torch.tensor([sequences[i] + [0] * (longest - len(sequences[i])) for i in rows])
        logps_BTV = policy(ids_BT).logits[:, :-1].log_softmax(-1)  # causal: padding behind a row changes nothing
        for row, i in enumerate(rows):
            targets_T = torch.tensor(sequences[i][1:])
            found[i] = logps_BTV[row, : len(targets_T)].gather(1, targets_T[:, None])[:, 0]
    return [found[i] for i in range(len(sequences))]


def test_random_conversations_are_what_the_policy_says(client: RolloutClient, model: Path) -> None:
    """Tools, forks, calls side by side, streams, histories that are rendered again or cut."""
    policy = P.make_policy(model)

    async def converse() -> list[tuple[SessionRecord, Agent]]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=client.url, timeout=300.0, limits=limits, trust_env=False) as http:
            turns = asyncio.Semaphore(AT_ONCE)

            async def one(seed: int) -> tuple[SessionRecord, Agent]:
                async with turns:
                    agent = await Agent.begin(http, seed)
                    await agent.converse(1 + seed % CALLS)
                    return await agent.end(), agent

            return await asyncio.gather(*map(one, range(CONVERSATIONS)))

    with _pushed(client, policy) as version:
        ended = asyncio.run(converse())
    assert sum(agent.tool_calls for _, agent in ended) > 0
    assert sum(record.repaired for record, _ in ended) > 0
    trajectories = [(each, agent) for record, agent in ended for each in record.trajectories]
    assert len(trajectories) > len(ended)
    own = _own_logprobs(policy, [each.token_ids for each, _ in trajectories])
    gaps = []
    for (trajectory, agent), logprobs_T in zip(trajectories, own, strict=True):
        ids, at = trajectory.token_ids, 0
        for start, end in trajectory.sampled:
            served_T = torch.tensor(trajectory.logprobs[at : at + end - start])
            at += end - start
            if (ids[:start], ids[start:end]) not in agent.shaped:
                gaps.append((logprobs_T[start - 1 : end - 1] - served_T).abs().max().item())
    assert len(gaps) > CONVERSATIONS
    assert max(gaps) < P.FP32
    for record, _ in ended:
        episode = episode_of(record, AllowedVersion(version), None)
        assert episode is not None
        sampled = sum(end - start for each in record.trajectories for start, end in each.sampled)
        assert sum(episode.mask) == sampled, "each sampled token is trained on once"


@pytest.mark.parametrize("in_flight", ["drain", "keep"])
def test_no_answer_is_older_than_its_session(client: RolloutClient, model: Path, in_flight: Any) -> None:
    """64 agents side by side while pushes land. Pushes that drain would wait for sessions that keep a version."""
    policy = P.make_policy(model)
    served, ended, failed = [0], threading.Event(), list[BaseException]()

    def push_on() -> None:
        try:
            with RolloutClient(client.url) as own:
                while not ended.wait(0.5):
                    version = WeightVersion(run_id=RUN, fence=0, step=served[0] + 1)
                    data = P.blob(policy, version, own.state().base.weights)
                    own.push(RUN, [data], P.LEASE, in_flight=in_flight)
                    served[0] += 1
        except BaseException as error:
            failed.append(error)

    async def converse() -> list[tuple[SessionOpened, int, SessionRecord]]:
        limits = httpx.Limits(max_connections=2 * AGENTS)
        async with httpx.AsyncClient(base_url=client.url, timeout=300.0, limits=limits, trust_env=False) as http:

            async def one(seed: int) -> list[tuple[SessionOpened, int, SessionRecord]]:
                records = []
                while served[0] < PUSHES and not failed:
                    before = served[0]
                    agent = await Agent.begin(http, seed, follow=in_flight == "drain" or seed % 2 == 0)
                    await agent.converse(3)
                    records.append((agent.opened, before, await agent.end()))
                return records

            return [each for records in await asyncio.gather(*map(one, range(AGENTS))) for each in records]

    with _pushed(client, policy):
        pushing = threading.Thread(target=push_on)
        pushing.start()
        try:
            sessions = asyncio.run(converse())
        finally:
            ended.set()
            pushing.join()
    assert not failed
    assert served[0] >= PUSHES
    assert len(sessions) >= AGENTS
    for opened, before, record in sessions:
        assert opened.version is not None
        assert opened.version.step >= before
        steps = [span.version.step for each in record.trajectories for span in each.spans if span.version]
        assert min(steps) >= opened.version.step
    until(lambda: client.state().ready)
