"""The outermost layer: what passes with which token, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from rollout_server.api.app import build_app
from rollout_server.api.middleware.auth import AuthMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import SESSION_CALLS, VLLM_ROUTES, Role, role_needed
from rollout_server.engine.proxy import EngineProxy
from rollout_server.runs.table import RunTable
from rollout_server.sessions.records import Sessions
from rollout_server.settings import ServerSettings
from shared import wire
from shared.sessions import SessionOpened, SessionRequest

HELD = {Role.WEIGHTS: "weights-0123456789", Role.GENERATE: "generate-0123456789", Role.METRICS: "metrics-0123456789"}
PUSH = "/v1/runs/r/adapter"
#: Paths, percent-decoded, that some servers take for others.
TWISTED = [
    "//v1/generate",
    "/v1//generate",
    "/v1/generate/",
    "/V1/generate",
    "/v1/Generate",
    "/v1/generate;x",
    "v1/generate",
    "/./v1/generate",
    "/x/../v1/generate",
    "/health/../v1/state",
    "/ready/../v1/state",
    "/health/",
    "//health",
    "/Health",
    "/health\0",
    "/health\n",
    "/v1/generate\n",
    "/metrics/../v1/state",
    "/metrics//",
    "/v1/runs/a/b",
    "/docs/oauth2-redirect",
    "/nothing",
    "/",
    "",
    "*",
    "http://server/health",
]


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.fixture
def client() -> httpx.AsyncClient:
    readiness = ReadinessMiddleware()
    readiness.open(_echo)
    return _client(AuthMiddleware(readiness, Tokens({}, HELD)))


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def _bearer(role: Role) -> dict[str, str]:
    return {"Authorization": f"Bearer {HELD[role]}"}


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("POST", "/v1/generate", Role.GENERATE),
        ("POST", "/v1/score", Role.GENERATE),
        ("GET", "/v1/state", Role.GENERATE),
        ("GET", "/v1/runs/r-1.x", Role.GENERATE),
        ("POST", "/v1/chat/completions", Role.GENERATE),
        ("GET", "/v1/responses/abc", Role.GENERATE),
        ("GET", "/metrics", Role.METRICS),
        ("GET", "/metrics/", Role.METRICS),
        ("DELETE", "/v1/runs/r", Role.WEIGHTS),
        ("PUT", PUSH, Role.WEIGHTS),
        ("POST", "/v1/runs/r/group", Role.WEIGHTS),
        ("POST", "/v1/runs/r/broadcast", Role.WEIGHTS),
        ("GET", PUSH, Role.WEIGHTS),
        ("POST", "/metrics", Role.WEIGHTS),
        ("POST", "/collective_rpc", Role.WEIGHTS),
        ("POST", "/sleep", Role.WEIGHTS),
        ("POST", "/v1/load_lora_adapter", Role.WEIGHTS),
    ],
)
async def test_roles(client: httpx.AsyncClient, method: str, path: str, needed: Role) -> None:
    for role in Role:
        answer = await client.request(method, path, headers=_bearer(role))
        allowed = role in (needed, Role.WEIGHTS)
        assert answer.status_code == (200 if allowed else 403)
        if not allowed:
            error = answer.json()["error"]
            assert error["code"] == "forbidden"
            assert role.value in error["message"]
            assert needed.value in error["message"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
async def test_nothing_but_health_and_ready_without_a_token(client: httpx.AsyncClient, method: str) -> None:
    for path in ["/v1/generate", "/v1/state", PUSH, "/metrics", "/openapi.json", "/", "/nothing"]:
        answer = await client.request(method, path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer", path
        if method != "HEAD":
            error = answer.json()["error"]
            assert error["code"] == "unauthenticated"
            assert "--token_file" in error["message"]
    for path in ("/health", "/ready"):
        answer = await client.request(method, path)
        assert answer.status_code == 200
        assert answer.content == b""


async def test_twisted_paths_need_the_strongest_role() -> None:
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    auth = AuthMiddleware(_echo, Tokens({}, HELD))
    for path in TWISTED:
        for method in ("GET", "POST", "OPTIONS"):
            for role, expected in {None: 401, Role.GENERATE: 403, Role.METRICS: 403, Role.WEIGHTS: 200}.items():
                headers = [(b"authorization", f"Bearer {HELD[role]}".encode())] if role else []
                statuses.clear()
                await auth({"type": "http", "method": method, "path": path, "headers": headers}, None, send)  # type: ignore[arg-type]
                assert statuses[0] == expected, (method, path, role)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic " + HELD[Role.WEIGHTS],
        HELD[Role.WEIGHTS],
        f"Bearer {HELD[Role.WEIGHTS]} x",
        f"Bearer {HELD[Role.WEIGHTS]}, Bearer x",
        f"Bearer {HELD[Role.WEIGHTS][:-1]}",
        f"Bearer{HELD[Role.WEIGHTS]}",
    ],
)
async def test_malformed_credentials(client: httpx.AsyncClient, header: str) -> None:
    assert (await client.get("/v1/state", headers={"Authorization": header})).status_code == 401


async def test_what_is_no_credential(client: httpx.AsyncClient) -> None:
    token = HELD[Role.WEIGHTS]
    assert (await client.get("/v1/state", headers={"authorization": f"bearer  {token}"})).status_code == 200
    assert (await client.get(f"/v1/state?token={token}&access_token={token}")).status_code == 401
    twice = [("Authorization", f"Bearer {token}"), ("Authorization", "Bearer other-0123456789")]
    assert (await client.get("/v1/state", headers=twice)).status_code == 401
    assert (await client.get("/v1/state", headers={"X-Api-Key": token, "Cookie": f"token={token}"})).status_code == 401


@pytest.mark.parametrize("path", ["/v1/realtime", "/health", "/", "/v1/generate"])
async def test_websockets_are_closed_before_they_are_accepted(path: str) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the app")

    auth = AuthMiddleware(never, Tokens({}, HELD))
    for headers in ([], [(b"authorization", f"Bearer {HELD[Role.GENERATE]}".encode())]):
        sent.clear()
        await auth({"type": "websocket", "path": path, "headers": headers}, None, send)  # type: ignore[arg-type]
        assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_also_while_the_model_loads() -> None:
    client = _client(AuthMiddleware(ReadinessMiddleware(), Tokens({}, HELD)))
    assert (await client.get("/v1/state")).status_code == 401
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503
    answer = await client.get("/v1/state", headers=_bearer(Role.GENERATE))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "not_ready"


async def test_without_tokens_everything_passes() -> None:
    readiness = ReadinessMiddleware()
    readiness.open(_echo)
    client = _client(AuthMiddleware(readiness, None))
    assert (await client.delete("http://localhost:8000/v1/runs/r")).text == "/v1/runs/r"


async def test_a_revoked_token_is_refused_at_once(tmp_path: Path) -> None:
    readiness = ReadinessMiddleware()
    readiness.open(_echo)
    (tmp_path / "token").write_text(HELD[Role.WEIGHTS])
    client = _client(AuthMiddleware(readiness, Tokens({Role.WEIGHTS: tmp_path / "token"})))
    assert (await client.get("/v1/state", headers=_bearer(Role.WEIGHTS))).status_code == 200
    (tmp_path / "token").write_text("another-one-0123456789")
    assert (await client.get("/v1/state", headers=_bearer(Role.WEIGHTS))).status_code == 401


def test_a_route_that_nobody_listed_needs_the_strongest_role() -> None:
    assert role_needed("POST", "/v1/made-up") is role_needed("websocket", "/v1/generate") is Role.WEIGHTS


class _Opened:
    """Two sessions behind the middleware, which tells what it lets through."""

    def __init__(self, *, tokens: bool = True) -> None:
        self.sessions, self.scopes = Sessions(ServerSettings()), list[Any]()
        auth = AuthMiddleware(self._see, Tokens({}, HELD) if tokens else None, sessions=self.sessions)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(auth), base_url="http://localhost:8000")

    async def _see(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await _echo(scope, receive, send)

    async def open(self, **fields: Any) -> SessionOpened:
        table = RunTable(2, 1)
        request = SessionRequest.model_validate({"policy": "base", **fields})
        return await self.sessions.open(request, EngineProxy(None, table))

    async def ask(self, method: str, path: str, token: str | None = None, **headers: str) -> int:
        """Return the status."""
        held = {"Authorization": f"Bearer {token}"} if token else {}
        return (await self.client.request(method, path, headers={**held, **headers})).status_code


def _all_routes(session_id: str) -> set[tuple[str, str]]:
    ours = build_app(None, FastAPI()).router.routes  # type: ignore[arg-type]
    routes = {(method, each.path) for each in ours if isinstance(each, APIRoute) for method in each.methods}
    below = {("POST", wire.SESSION + path) for path in SESSION_CALLS}
    return {
        (method, path.format(session_id=session_id, run_id="r", response_id="x"))
        for method, path in routes | below | set(VLLM_ROUTES) | {("GET", "/openapi.json"), ("GET", "/docs")}
    }


@pytest.mark.parametrize("tokens", [True, False])
async def test_a_sessions_token_opens_that_session_and_nothing_else(tokens: bool) -> None:
    opened = _Opened(tokens=tokens)
    own, other = await opened.open(), await opened.open()
    plain = {("POST", path) for path in SESSION_CALLS} | {("GET", "/v1/models")}
    mine = {(method, f"/v1/sessions/{own.session_id}{path}") for method, path in plain}
    walked = _all_routes(own.session_id) | _all_routes(other.session_id)
    assert len(walked) > 40
    assert plain | mine <= walked
    for method, path in walked:
        status = await opened.ask(method, path, own.token)
        assert status == (200 if (method, path) in plain | mine else 403), (method, path)
    assert len(opened.scopes) == len(plain | mine)


async def test_calls_go_on_with_the_path_of_vllm() -> None:
    opened = _Opened()
    session = await opened.open()
    for path, held in (
        (f"{session.path}/chat/completions", session.token),
        (f"{session.path}/chat/completions", HELD[Role.GENERATE]),
        ("/v1/chat/completions", session.token),
    ):
        assert await opened.ask("POST", path, held) == 200
        scope = opened.scopes.pop()
        assert scope["path"] == "/v1/chat/completions"
        assert scope["raw_path"] == b"/v1/chat/completions"
        assert scope["lockstep.session"].session_id == session.session_id
    assert await opened.ask("POST", "/v1/chat/completions", HELD[Role.GENERATE]) == 200
    assert "lockstep.session" not in opened.scopes.pop()
    assert await opened.ask("POST", f"{session.path}/chat/completions", HELD[Role.METRICS]) == 403
    assert await opened.ask("POST", f"{session.path}/chat/completions") == 401


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/chat/completions"), ("GET", "/models"), ("POST", "/v1/v1/messages")]
)
async def test_a_base_url_with_or_without_the_version(method: str, path: str) -> None:
    """Neither is a matter of the token."""
    opened = _Opened()
    own, other = await opened.open(), await opened.open()
    for below in ("", own.path.removesuffix("/v1")):
        for held in (own.token, HELD[Role.GENERATE]):
            answer = await opened.client.request(method, below + path, headers={"Authorization": f"Bearer {held}"})
            assert answer.status_code == 404
            assert f"but {method} {below}/v1{path.removeprefix('/v1/v1')}: " in answer.json()["error"]["message"]
        assert await opened.ask(method, below + path, HELD[Role.METRICS]) == 403
        assert await opened.ask(method, below + path) == 401
    assert await opened.ask(method, other.path.removesuffix("/v1") + path, own.token) == 403
    assert await opened.ask("POST", "/collective_rpc", own.token) == 403
    assert not opened.scopes


async def test_clients_of_anthropic_send_the_token_in_a_header_of_their_own() -> None:
    opened = _Opened()
    session = await opened.open()
    assert await opened.ask("POST", "/v1/messages", **{"X-Api-Key": session.token}) == 200
    assert opened.scopes.pop()["lockstep.session"].session_id == session.session_id
    assert await opened.ask("POST", "/v1/messages", **{"X-Api-Key": HELD[Role.WEIGHTS]}) == 401
    assert await opened.ask("POST", "/v1/messages", "wrong-0123456789", **{"X-Api-Key": session.token}) == 401


async def test_where_there_are_no_tokens_the_path_is_enough() -> None:
    opened = _Opened(tokens=False)
    session = await opened.open()
    assert await opened.ask("POST", f"{session.path}/responses") == 200
    assert opened.scopes.pop()["lockstep.session"].session_id == session.session_id
    assert await opened.ask("POST", f"{session.path}/responses", Origin="http://evil.example") == 403
    assert await opened.ask("POST", f"{session.path}/responses", Host="evil.example") == 403
    assert await opened.ask("POST", "/v1/responses", "EMPTY") == 200
    assert "lockstep.session" not in opened.scopes.pop()


@pytest.mark.parametrize("tokens", [True, False])
async def test_sessions_of_a_server_that_has_restarted_are_unknown(tokens: bool) -> None:
    """A call that is not recorded would be lost for the training."""
    opened, before = _Opened(tokens=tokens), await _Opened().open()
    assert await opened.ask("POST", f"{before.path}/responses", HELD[Role.GENERATE]) == 404
    for path in (f"{before.path}/responses", "/v1/responses"):
        answer = await opened.client.post(path, headers={"Authorization": f"Bearer {before.token}"})
        assert answer.status_code == (401 if tokens else 404)
        assert "restarted" in answer.json()["error"]["message"]
    assert not opened.scopes


async def test_a_reward_by_the_sessions_token_only_where_it_is_accepted() -> None:
    opened = _Opened()
    for accepted, status in ((True, 200), (False, 403)):
        session = await opened.open(accept_reward=accepted)
        path = wire.SESSION_REWARD.format(session_id=session.session_id)
        assert await opened.ask("POST", path, session.token) == status
        assert await opened.ask("POST", path, HELD[Role.GENERATE]) == 200


async def test_a_reward_where_there_are_no_tokens_only_where_it_is_accepted() -> None:
    opened = _Opened(tokens=False)
    for accepted, status in ((True, 200), (False, 403)):
        session = await opened.open(accept_reward=accepted)
        path = wire.SESSION_REWARD.format(session_id=session.session_id)
        for held in (session.token, HELD[Role.WEIGHTS], None):
            assert await opened.ask("POST", path, held) == status
    assert await opened.ask("POST", wire.SESSION_REWARD.format(session_id="none")) == 404


async def test_a_session_that_has_ended_says_so() -> None:
    opened = _Opened()
    session = await opened.open()
    opened.sessions.delete(session.session_id)
    answer = await opened.client.post(f"{session.path}/messages", headers={"X-Api-Key": session.token})
    assert answer.status_code == 410
    assert answer.json()["error"]["code"] == "session_ended"
