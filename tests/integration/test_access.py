"""Access to every route of the real app, in vLLM's development mode, too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, WebSocketRoute

from rollout_server import cli
from rollout_server.api.app import build_app
from rollout_server.api.middleware.auth import AuthMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import Role, role_needed
from rollout_server.vllm_compat import versions
from tests.integration.support.server import HTTP, ServerProcess

HELD = {Role.WEIGHTS: "weights-0123456789", Role.GENERATE: "generate-0123456789", Role.METRICS: "metrics-0123456789"}
#: Some of what vLLM would serve with these settings.
CLOSED = [
    "/collective_rpc",
    "/sleep",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/reset_prefix_cache",
    "/pause",
    "/scale_elastic_ep",
    "/invocations",
    "/abort_requests",
    "/server_info",
]
SERVED = ["/v1/generate", "/v1/state", "/v1/runs/x/adapter", "/v1/chat/completions", "/v1/models", "/metrics/"]


@pytest.fixture(scope="module")
def apps(model: Path) -> SimpleNamespace:
    """The real app, and the paths of vLLM's app before any were removed."""
    from vllm.config import ModelConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        args, _ = cli.parse([str(model)])
        config = ModelConfig(model=str(model), dtype="float32")
        theirs = versions.build_openai_app(args, ("generate", "render"), config)
        all_of_vllm = {path for _, path in _routes(theirs.routes)}
        return SimpleNamespace(app=build_app(SimpleNamespace(), theirs), vllm=all_of_vllm)  # type: ignore[arg-type]


def _routes(routes: list[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield method and path of every route, in mounts too; of a mount also its root and a path below it."""
    for route in routes:
        path = prefix + re.sub(r"\{[^}]*\}", "x", route.path)
        if isinstance(route, Mount):
            below = path.rstrip("/")
            yield from (("GET", below or "/"), ("GET", below + "/"), ("POST", below + "/anything"))
            yield from _routes(route.routes or [], below)
        elif isinstance(route, WebSocketRoute):
            yield "websocket", path
        else:
            yield from ((method, path) for method in route.methods)


async def _status(app: Any, method: str, path: str, role: Role | None) -> int:
    headers = {"Authorization": f"Bearer {HELD[role]}"} if role else {}
    if method == "websocket":
        return await _websocket_status(app, path, headers)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return (await client.request(method, path, headers=headers)).status_code


async def _websocket_status(app: Any, path: str, headers: dict[str, str]) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "websocket", "path": path, "headers": raw}, None, send)
    if sent != [{"type": "websocket.close", "code": 1008}]:
        return 101
    return 403 if headers else 401


async def test_every_route_asks_for_a_token_and_its_role(apps: SimpleNamespace) -> None:
    readiness = ReadinessMiddleware()
    readiness.open(apps.app)
    auth = AuthMiddleware(readiness, Tokens({}, HELD))
    routes = sorted(set(_routes(apps.app.routes)))
    assert {path for _, path in routes} >= set(SERVED), routes
    for method, path in routes:
        for also in {method, "HEAD", "OPTIONS"} - {"websocket"} or {method}:
            assert await _status(auth, also, path, None) == 401, (also, path)
        needed = role_needed(method, path)
        if needed is not Role.METRICS:
            assert await _status(auth, method, path, Role.METRICS) == 403, (method, path)
        if needed is not Role.GENERATE:
            assert await _status(auth, method, path, Role.GENERATE) == 403, (method, path)
    open_to_scrapers = {path for method, path in routes if role_needed(method, path) is Role.METRICS}
    assert open_to_scrapers == {"/metrics", "/metrics/"}
    for path in ("/health", "/ready"):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(auth), base_url="http://server") as client:
            answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.content == b""


async def test_what_vllm_opens_for_developers_is_not_there_at_all(apps: SimpleNamespace) -> None:
    readiness = ReadinessMiddleware()
    readiness.open(apps.app)
    assert set(CLOSED) <= apps.vllm, "vLLM has renamed them: look again at what must stay closed"
    for path in CLOSED:
        for method in ("GET", "POST"):
            assert await _status(AuthMiddleware(readiness, Tokens({}, HELD)), method, path, Role.WEIGHTS) == 404, path
            assert await _status(readiness, method, path, None) == 404, path


#: What a page of another site makes a browser say.
PAGES = [
    {"Host": "evil.example"},
    {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_does_nothing_to_a_server_without_tokens(server: ServerProcess, page: dict[str, str]) -> None:
    body = {"prompts": [{"text": "a"}], "policy": "base", "sampling": {"max_tokens": 1}}
    chat = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    lease = {"Lockstep-Lease": "a lease of a page"}
    for method, path, sent in (
        ("PUT", "/v1/runs/x/adapter", None),
        ("DELETE", "/v1/runs/x", None),
        ("POST", "/v1/generate", body),
        ("POST", "/v1/chat/completions", chat),
        ("GET", "/v1/models", None),
        ("GET", "/v1/state", None),
        ("GET", "/metrics", None),
        ("POST", "/v1/drain", None),
    ):
        answer = HTTP.request(method, server.url + path, json=sent, headers={**page, **lease})
        assert answer.status_code == 403, (method, path)
        assert answer.json()["error"]["code"] == "forbidden"
        preflight = {**page, "Access-Control-Request-Method": method}
        answer = HTTP.request("OPTIONS", server.url + path, headers=preflight)
        assert answer.status_code == 403, path
        assert "access-control-allow-origin" not in answer.headers
    assert HTTP.get(server.url + "/v1/state").json()["draining"] is False
    own = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert HTTP.post(server.url + "/v1/generate", json=body, headers=own).status_code == 200


def test_errors_of_our_routes_have_our_body(server: ServerProcess) -> None:
    for method, path, sent, status, code in (
        ("GET", "/v1/generate", b"", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/runs/x/adapter", b"", 405, "method_not_allowed"),
        ("POST", "/v1/runs/x/nothing", b"", 404, "unknown_route"),
        ("GET", "/v1/state/", b"", 404, "unknown_route"),
        ("POST", "/v1/generate", b"\xff", 400, "invalid_request"),
        ("POST", "/v1/score", b"[" * 100_000, 413, "too_large"),
        ("GET", "/v1/runs/x", b"", 404, "unknown_run"),
    ):
        answer = HTTP.request(method, server.url + path, content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, (method, path)
        assert answer.json()["error"]["code"] == code, (method, path)
