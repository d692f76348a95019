"""A fake rollout server with sessions: `POST {path}/completions` takes and returns token ids, and is recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from shared.errors import InvalidRequest, UnknownSession
from shared.rollouts import GenerateRequest, Prompt, VersionSpan
from shared.sampling import SamplingParams
from shared.sessions import SessionOpened, SessionRecord, SessionRequest, SessionReward, Trajectory
from tests.support.fake_server import FakeServer


@dataclass
class FakeSession:
    request: SessionRequest
    policy: Any
    record: SessionRecord


@dataclass
class FakeSessions(FakeServer):
    """`spoil` is called with every trajectory that is answered, and returns what is answered in its place."""

    model: Any
    state: Any
    opened: list[SessionRequest] = field(default_factory=list)
    open: dict[str, FakeSession] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.model, self.state)
        self.spoil = lambda trajectory: trajectory
        self.refuses_calls = False

    def restart(self) -> None:
        super().restart()
        self.open.clear()

    def _route(self, request: httpx.Request) -> httpx.Response:
        path, method = request.url.path, request.method
        if path == "/detokenize":
            words = " ".join(f"w{token - 3}" for token in json.loads(request.content)["tokens"])
            return httpx.Response(200, json={"prompt": words})
        if not path.startswith("/v1/sessions"):
            return super()._route(request)
        if path == "/v1/sessions":
            return self._json(self._opened(SessionRequest.model_validate_json(request.content)))
        session_id, _, below = path.removeprefix("/v1/sessions/").partition("/")
        if session_id not in self.open:
            raise UnknownSession("no such session")
        session = self.open[session_id]
        if below:
            assert request.headers["Authorization"] == f"Bearer token-{session_id}"
        if below == "v1/completions":
            return httpx.Response(200, json=self._call(session, json.loads(request.content)))
        if below == "reward":
            if not session.request.accept_reward:
                raise InvalidRequest("no reward is taken")
            session.record.reward = SessionReward.model_validate_json(request.content).reward
            return httpx.Response(200, json={})
        assert method == "DELETE"
        record = self.open.pop(session_id).record
        self.closed.append(session_id)
        return self._json(record.model_copy(update={"trajectories": list(map(self.spoil, record.trajectories))}))

    def _opened(self, request: SessionRequest) -> SessionOpened:
        version = self._resolve(request.policy, request.run_id)
        name = f"s{len(self.opened)}"
        self.opened.append(request)
        counts = {"calls": 0, "running": 0, "cut": 0, "repaired": 0}
        record = SessionRecord(
            session_id=name, run_id=request.run_id, ended=None, reward=None, metadata={}, trajectories=[], **counts
        )
        self.open[name] = FakeSession(request, "latest" if request.follow else version or "base", record)
        return SessionOpened(session_id=name, token=f"token-{name}", path=f"/v1/sessions/{name}/v1", version=version)

    def _call(self, session: FakeSession, body: dict[str, Any]) -> dict[str, Any]:
        if self.refuses_calls:
            raise InvalidRequest("no calls are taken")
        policy = session.policy
        sampling = SamplingParams(
            max_tokens=body.get("max_tokens", session.request.sampling.max_tokens), top_k=session.request.sampling.top_k
        )
        asked = GenerateRequest(
            prompts=[Prompt(token_ids=body["prompt"])], sampling=sampling, policy=policy, run_id=session.request.run_id
        )
        (group,) = self._generate(asked).groups
        (completion,) = group.completions
        record = session.record
        number, record.calls = record.calls, record.calls + 1
        self._add(record.trajectories, number, body["prompt"], completion)
        return {"token_ids": completion.token_ids}

    @staticmethod
    def _add(trajectories: list[Trajectory], number: int, prompt: list[int], completion: Any) -> None:
        found = next((t for t in trajectories if prompt[: len(t.token_ids)] == t.token_ids), None)
        if found is None:
            kept = [] if completion.log_kept_mass is not None else None
            found = Trajectory(
                token_ids=[], sampled=[], logprobs=[], log_kept_mass=kept, spans=[], calls=[], finish_reasons=[]
            )
            trajectories.append(found)
        found.token_ids = [*prompt, *completion.token_ids]
        found.sampled.append((len(prompt), len(found.token_ids)))
        before = len(found.logprobs)
        found.logprobs += completion.logprobs
        if found.log_kept_mass is not None:
            found.log_kept_mass += completion.log_kept_mass
        version = completion.spans[0].version
        found.spans.append(VersionSpan(version=version, start=before, end=len(found.logprobs)))
        found.calls.append(number)
        found.finish_reasons.append("length")

    @staticmethod
    def _json(model: Any) -> httpx.Response:
        return httpx.Response(200, content=model.model_dump_json(), headers={"content-type": "application/json"})


def ask(server: FakeServer, session: Any, prompt: Sequence[int], **body: Any) -> list[int]:
    """Make a call in a session, as an agent does; return the sampled tokens."""
    headers = {"Authorization": f"Bearer {session.api_key}"}
    with httpx.Client(transport=server.transport, headers=headers) as client:
        response = client.post(f"{session.base_url}/completions", json={"prompt": list(prompt), **body})
        response.raise_for_status()
        return response.json()["token_ids"]
