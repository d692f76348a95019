"""The outermost layer: what passes with which token, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from rollout_server.api.middleware.auth import AuthMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import Role, role_needed

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
