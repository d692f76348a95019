"""Paths, headers and lines of our routes, over a service that only records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from learner.servers.client import RolloutClient
from rollout_server.api import metrics
from rollout_server.api.app import build_app
from rollout_server.generation import requests
from shared.errors import ErrorBody, ErrorCode, LockstepError, NoGroup, NotFinite, UnknownRun
from shared.rollouts import GenerateRequest, Prompt, RolloutGroup
from shared.sessions import SessionOpened, SessionRecord
from shared.weights import PushReceipt, RunState, TrainingEnd, WeightVersion
from tests.unit.rollout_server.sessions.conversing import Served

LEASE = "a lease of tests"
RECEIPT = PushReceipt(
    epoch="e",
    version=WeightVersion(run_id="r", step=1),
    install_seq=1,
    checksum="sum",
    bytes=3,
    transport="http",
    workers=1,
    modules=1,
    transfer_seconds=0,
    wait_seconds=0,
    install_seconds=0,
    flip_seconds=0,
    pause_seconds=0,
)


class _Service:
    served = SimpleNamespace(epoch="e")
    proxy = runs = exclusive = None

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.error: LockstepError | None = None

    async def push(self, run_id: str, lease: str, takeover: bool, body: Any, in_flight: str) -> PushReceipt:
        self.calls.append((run_id, lease, takeover, b"".join([part async for part in body]), in_flight))
        return RECEIPT

    async def broadcast(self, run_id: str, lease: str, announced: Any, in_flight: str):
        self.calls.append((run_id, lease, announced.checksum, in_flight))
        if isinstance(self.error, NoGroup):
            raise self.error
        yield None
        if self.error:
            raise self.error
        yield RECEIPT

    async def end_run(self, run_id: str, lease: str, takeover: bool) -> None:
        self.calls.append((run_id, lease, takeover))

    def finish_run(self, run_id: str, lease: str, ended: TrainingEnd) -> RunState:
        self.calls.append((run_id, lease, ended))
        seen: dict[str, Any] = {"install_seq": 1, "slots": [], "running_requests": 0}
        return RunState(run_id=run_id, version=ended.version, checksum=None, **seen)


@pytest.fixture
def service() -> _Service:
    return _Service()


@pytest.fixture
def client(service: _Service) -> httpx.AsyncClient:
    app = build_app(service, FastAPI())  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def _told(monkeypatch: pytest.MonkeyPatch, *events: Any) -> None:
    async def generate(*_: Any):
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    monkeypatch.setattr(requests, "generate", generate)


GROUPS = [RolloutGroup(prompt_index=index, prompt_token_ids=[index], completions=[]) for index in (0, 1)]
BODY = GenerateRequest(prompts=[Prompt(token_ids=[0]), Prompt(token_ids=[1])])


async def test_groups_as_one_answer_and_as_lines(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    _told(monkeypatch, None, GROUPS[1], None, GROUPS[0])
    answer = await client.post("/v1/generate", json=BODY.model_dump())
    assert answer.json() == {"epoch": "e", "groups": [group.model_dump() for group in GROUPS]}
    answer = await client.post("/v1/generate", json=BODY.model_copy(update={"stream": True}).model_dump())
    assert answer.headers["content-type"] == "application/x-ndjson"
    late, early = (group.model_dump_json() for group in GROUPS)
    assert answer.text == f'{early}\n\n{late}\n{{"done":true,"epoch":"e"}}\n'


async def test_errors_before_and_after_the_first_line(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stream = UnknownRun("gone"), BODY.model_copy(update={"stream": True}).model_dump()
    _told(monkeypatch, gone)
    assert (await client.post("/v1/generate", json=stream)).status_code == 404
    _told(monkeypatch, None, GROUPS[0], gone)
    answer = await client.post("/v1/generate", json=stream)
    assert answer.status_code == 200
    assert answer.text == f"{GROUPS[0].model_dump_json()}\n{gone.body().model_dump_json()}\n"
    assert (await client.post("/v1/generate", json=BODY.model_dump())).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/generate", 405, "method_not_allowed"),
        ("DELETE", "/v1/state", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/runs/r/adapter", 405, "method_not_allowed"),
        ("PATCH", "/v1/runs/r", 405, "method_not_allowed"),
        ("BREW", "/v1/score", 405, "method_not_allowed"),
        ("POST", "/v1/generate/", 404, "unknown_route"),
        ("GET", "/v1/runs", 404, "unknown_route"),
        ("GET", "/v1/runs/r/nothing", 404, "unknown_route"),
        ("GET", "/v1/runs/a/b/c", 404, "unknown_route"),
        ("GET", "/", 404, "unknown_route"),
        ("GET", "/collective_rpc", 404, "unknown_route"),
        ("POST", "/v1/load_lora_adapter", 404, "unknown_route"),
    ],
)
async def test_what_is_not_there_has_our_body(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    error = ErrorBody.model_validate(answer.json()).error
    assert error.code == code
    if status == 405:
        assert answer.headers["allow"] in error.message


@pytest.mark.parametrize("path", ["/v1/runs/r", "/v1/sessions/none"])
async def test_all_methods_of_a_path_are_named(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.put(path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("PUT", "/v1/completions", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/tokenizer_info", 404, "unknown_route"),
    ],
)
async def test_what_is_not_there_below_vllms_paths_has_our_body(
    service: _Service, method: str, path: str, status: int, code: str
) -> None:
    vllm = FastAPI()

    @vllm.post("/v1/completions")
    async def complete() -> None: ...

    transport = httpx.ASGITransport(build_app(service, vllm), raise_app_exceptions=False)  # type: ignore[arg-type]
    answer = await httpx.AsyncClient(transport=transport, base_url="http://server").request(method, path)
    assert answer.status_code == status
    assert ErrorBody.model_validate(answer.json()).error.code == code


@pytest.mark.parametrize("below", ["", "/v1/sessions/none"])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/messages"])
async def test_a_base_url_with_or_without_the_version(client: httpx.AsyncClient, below: str, path: str) -> None:
    answer = await client.post(below + path, json={})
    assert answer.status_code == 404
    assert f"POST {below}/v1{path.removeprefix('/v1/v1')}: " in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"prompts": [{"text": "\\ud800"}], "x": 1}', b"[" * 100_000],
    ids=["none", "cut", "list", "null", "no-utf8", "unknown-field", "deep"],
)
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/score", "/v1/runs/r/broadcast"])
async def test_bodies_that_cannot_be_read_have_our_body(client: httpx.AsyncClient, path: str, content: bytes) -> None:
    headers = {"Lockstep-Lease": LEASE, "Content-Type": "application/json"}
    answer = await client.post(path, content=content, headers=headers)
    assert answer.status_code == 400
    assert ErrorBody.model_validate(answer.json()).error.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("padding", [0, 10**5], ids=["small", "large"])
@pytest.mark.parametrize("sent", [None, "application/x-www-form-urlencoded", "text/plain", "json"])
async def test_bodies_of_another_type(client: httpx.AsyncClient, sent: str | None, padding: int) -> None:
    """As `curl -d` sends them, whose type is that of a form."""
    headers = {"Content-Type": sent} if sent else {}
    content = BODY.model_dump_json().encode() + b" " * padding
    answer = await client.post("/v1/generate", content=content, headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("padding", [0, 10**5], ids=["small", "large"])
async def test_json_that_is_cut_off(client: httpx.AsyncClient, padding: int) -> None:
    content = b" " * padding + BODY.model_dump_json().encode()[:-1]
    answer = await client.post("/v1/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "no JSON" in message
    assert str(len(content)) in message


async def test_a_version_that_the_body_should_name(client: httpx.AsyncClient) -> None:
    """The header would have no effect on our routes, and completions of any version would be taken for it."""
    for path in ("/v1/generate", "/v1/score", "/v1/sessions"):
        answer = await client.post(path, json={}, headers={"Lockstep-Policy": "r@0.1"})
        assert answer.status_code == 400
        assert '"policy"' in answer.json()["error"]["message"]


class EngineDeadError(Exception):
    """As vLLM's."""


@pytest.mark.parametrize(
    "failure",
    [KeyError("slot"), EngineDeadError(), ValueError("vLLM's"), NotImplementedError(), HTTPException(503, "vLLM's")],
    ids=lambda failure: type(failure).__name__,
)
async def test_what_nobody_has_caught_has_our_body(
    client: httpx.AsyncClient, service: _Service, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    async def fail(*_: Any) -> None:
        raise failure

    async def fail_late(*_: Any) -> Any:
        yield None
        raise failure

    _told(monkeypatch, failure)
    stream = BODY.model_copy(update={"stream": True}).model_dump()
    for name in ("push", "end_run"):
        monkeypatch.setattr(service, name, fail)
    monkeypatch.setattr(service, "broadcast", fail_late)
    lease = {"Lockstep-Lease": LEASE}
    announced = {"version": RECEIPT.version.model_dump(), "checksum": "0" * 32, "layout": "0" * 32}
    for answer in (
        await client.post("/v1/generate", json=BODY.model_dump()),
        await client.post("/v1/generate", json=stream),
        await client.put("/v1/runs/r/adapter", content=b"abc", headers=lease),
        await client.delete("/v1/runs/r", headers=lease),
        await client.get("/v1/runs/r"),
        await client.get("/v1/state"),
        await client.post("/v1/wake"),
    ):
        assert answer.status_code == 500, answer.url
        assert ErrorBody.model_validate(answer.json()).error.code is ErrorCode.INTERNAL_ERROR
    answer = await client.post("/v1/runs/r/broadcast", json=announced, headers=lease)
    first, last = answer.text.splitlines()
    assert first == '{"receiving":true}'
    assert ErrorBody.model_validate_json(last).error.code is ErrorCode.INTERNAL_ERROR
    _told(monkeypatch, None, GROUPS[0], failure)
    answer = await client.post("/v1/generate", json=stream)
    assert ErrorBody.model_validate_json(answer.text.splitlines()[-1]).error.code is ErrorCode.INTERNAL_ERROR


async def test_pushes(client: httpx.AsyncClient, service: _Service) -> None:
    headers = {"lockstep-lease": LEASE, "lockstep-takeover": "1", "lockstep-in-flight": "keep"}
    answer = await client.put("/v1/runs/r/adapter", content=b"abc", headers=headers)
    assert PushReceipt.model_validate(answer.json()) == RECEIPT
    await client.put("/v1/runs/r/adapter", content=b"", headers={"Lockstep-Lease": LEASE})
    assert service.calls == [("r", LEASE, True, b"abc", "keep"), ("r", LEASE, False, b"", "drain")]
    assert (await client.put("/v1/runs/r/adapter", content=b"abc")).status_code == 400
    assert (await client.delete("/v1/runs/r", headers={"Lockstep-Lease": LEASE})).status_code == 204


async def test_a_push_whose_client_goes_away_is_counted_and_leaves_no_traceback(service: _Service) -> None:
    parts = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]
    headers = [(b"lockstep-lease", LEASE.encode())]
    scope = {"type": "http", "method": "PUT", "path": "/v1/runs/r/adapter", "headers": headers, "query_string": b""}
    counted, sent = metrics.PUSHES.labels("timeout")._value, []

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    before = counted.get()
    await build_app(service, FastAPI())(scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
    assert counted.get() == before + 1


async def test_ends_of_runs(client: httpx.AsyncClient, service: _Service) -> None:
    version = RECEIPT.version
    headers = {"Lockstep-Lease": LEASE}
    answer = await client.post("/v1/runs/r/finish", json={"version": version.model_dump()}, headers=headers)
    assert RunState.model_validate(answer.json()).version == version
    assert (await client.delete("/v1/runs/r", headers=headers)).status_code == 204
    assert (await client.delete("/v1/runs/r", headers={**headers, "Lockstep-Takeover": "1"})).status_code == 204
    assert service.calls == [("r", LEASE, TrainingEnd(version=version)), ("r", LEASE, False), ("r", LEASE, True)]
    for wrong in ({}, {"version": version.model_dump(), "keep_seconds": -1}, {"version": "r@0.1"}):
        assert (await client.post("/v1/runs/r/finish", json=wrong, headers=headers)).status_code == 400
    assert (await client.post("/v1/runs/r/finish", json={"version": version.model_dump()})).status_code == 400


async def test_broadcasts(client: httpx.AsyncClient, service: _Service) -> None:
    body = {"version": RECEIPT.version.model_dump(), "checksum": "0" * 32, "layout": "0" * 32}

    async def lines() -> tuple[int, list[str]]:
        answer = await client.post("/v1/runs/r/broadcast", json=body, headers={"Lockstep-Lease": LEASE})
        return answer.status_code, answer.text.splitlines()

    assert await lines() == (200, ['{"receiving":true}', RECEIPT.model_dump_json()])
    service.error = NotFinite("NaN")
    assert await lines() == (200, ['{"receiving":true}', NotFinite("NaN").body().model_dump_json()])
    service.error = NoGroup("none")
    assert (await lines())[0] == 409
    assert service.calls[0] == ("r", LEASE, "0" * 32, "drain")


def test_the_learner_spells_them_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and headers of its client reach a route that exists."""
    routes = {
        (method, route.path)  # type: ignore[attr-defined]
        for route in build_app(SimpleNamespace(), FastAPI()).routes  # type: ignore[arg-type]
        for method in getattr(route, "methods", ())
    }
    sent: list[tuple[str, str]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, request.url.path.replace("/runs/r", "/runs/{run_id}")))
        return httpx.Response(404, json=UnknownRun("r").body().model_dump(mode="json"))

    client = RolloutClient("http://server", transport=httpx.MockTransport(handler))
    for call in (
        client.state,
        lambda: client.generate(BODY),
        lambda: client.push("r", [b""], LEASE),
        lambda: list(client.join_group("r", LEASE)),
        client.sleep,
        client.wake,
        lambda: client.run("r"),
        lambda: client.delete_run("r", LEASE),
    ):
        with pytest.raises(LockstepError) as refusal:
            call()
        assert refusal.value.code is ErrorCode.UNKNOWN_RUN
    assert len(sent) == 8
    assert set(sent) <= routes


@pytest.fixture
async def sessions() -> httpx.AsyncClient:
    """The routes of sessions over a run at step 0, without vLLM's."""
    served = Served()
    await served.flip(0)
    service: Any = SimpleNamespace(sessions=served.sessions, proxy=served.proxy)
    transport = httpx.ASGITransport(build_app(service, FastAPI()), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


async def test_the_life_of_a_session(sessions: httpx.AsyncClient) -> None:
    answer = await sessions.post("/v1/sessions", json={"metadata": {"row": "3"}})
    opened = SessionOpened.model_validate(answer.json())
    path = f"/v1/sessions/{opened.session_id}"
    assert opened.path == f"{path}/v1"
    assert opened.version == WeightVersion(run_id="r", step=0)
    assert (await sessions.get(f"{path}/v1/models")).json()["data"][0]["id"] == "policy"
    assert (await sessions.post(f"{path}/reward", json={"reward": 0.5})).status_code == 204
    record = SessionRecord.model_validate((await sessions.get(path)).json())
    assert (record.ended, record.reward, record.metadata) == (None, 0.5, {"row": "3"})
    for _ in range(2):
        record = SessionRecord.model_validate((await sessions.delete(path)).json())
        assert record.ended == "deleted"
    late = await sessions.post(f"{path}/reward", json={"reward": 1})
    assert late.status_code == 410
    assert late.json()["error"]["code"] == "session_ended"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/sessions", {"run_id": "nobody"}, 404, "unknown_run"),
        ("/v1/sessions", {"policy": {"run_id": "r", "fence": 0, "step": 9}}, 409, "version_not_active"),
        ("/v1/sessions", {"max_calls": 0}, 400, "invalid_request"),
        ("/v1/sessions", {"sampling": {"temprature": 1}}, 400, "invalid_request"),
        ("/v1/sessions", {"sampling": {"temperature": 3}}, 400, "invalid_request"),
        ("/v1/sessions", {"metadata": {"a": "x" * 2000}}, 400, "invalid_request"),
        ("/v1/sessions/none/reward", {"reward": 1}, 404, "unknown_session"),
        ("/v1/sessions/none/reward", {"reward": "NaN"}, 400, "invalid_request"),
        ("/v1/sessions/none/reward", {}, 400, "invalid_request"),
        ("/v1/sessions/none/v1/embeddings", {}, 404, "unknown_route"),
    ],
)
async def test_bad_requests_to_sessions(
    sessions: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    answer = await sessions.post(path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
