"""What pages in a browser of the same machine can do to a server without tokens: nothing. Over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from rollout_server.api.app import build_app
from rollout_server.api.middleware.auth import AuthMiddleware
from rollout_server.api.middleware.limits import LimitsMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.security import binding
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import Role
from rollout_server.api.server import HttpServer
from rollout_server.engine.capacity import Capacity
from rollout_server.settings import ServerSettings
from shared.errors import LockstepError
from shared.local_access import LocalAccess
from tests.unit.rollout_server.api.security.test_binding import TOKENS, arguments

TOKEN = "-".join(["a", "token", "for", "these", "tests"])
#: Of our routes, of vLLM's, and of nobody's.
REQUESTS = [
    ("PUT", "/v1/runs/r/adapter"),
    ("DELETE", "/v1/runs/r"),
    ("POST", "/v1/runs/r/group"),
    ("POST", "/v1/drain"),
    ("POST", "/v1/sleep"),
    ("POST", "/v1/generate"),
    ("GET", "/v1/state"),
    ("GET", "/v1/runs/r"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("POST", "/start_profile"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
    ("OPTIONS", "/v1/runs/r/adapter"),
    ("HEAD", "/v1/state"),
]
PAGES = [
    ["Host: evil.example"],
    ["Host: evil.example", "Origin: http://evil.example"],
    ["Host: 10.1.2.3"],
    ["Host: localhost", "Host: evil.example"],
    ["Host: localhost", "Origin: http://evil.example"],
    ["Host: localhost", "Origin: null"],
    ["Host: localhost:{port}", "Origin: http://localhost:3000"],
    ["Host: localhost", "Sec-Fetch-Site: cross-site"],
    ["Host: localhost", "Sec-Fetch-Site: same-site"],
    ["Host: localhost", "Origin: http://localhost", "Sec-Fetch-Site: cross-site"],
]


class _Reached:
    """Our service and vLLM's app: both only record."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.vllm = FastAPI()
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
            self.vllm.add_api_route(path, self._record, methods=[method])
        # vLLM's, with the flags of `--allowed-origins '["*"]'`.
        self.vllm.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self.calls.append(name)
        return self

    async def _record(self) -> dict[str, str]:
        self.calls.append("vllm")
        return {}


@contextlib.asynccontextmanager
async def _served(
    reached: _Reached,
    tokens: Tokens | None = None,
    bound: str = "127.0.0.1",
    origins: Sequence[str] = (),
    access: LocalAccess | None = None,
) -> AsyncIterator[int]:
    readiness, settings = ReadinessMiddleware(), ServerSettings()
    app = build_app(reached, reached.vllm)  # type: ignore[arg-type]
    readiness.open(LimitsMiddleware(app, settings, Capacity(settings)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        local = access or LocalAccess(bound)
        server = HttpServer(AuthMiddleware(readiness, tokens, local, origins), log_level="critical")
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


async def _ask(port: int, method: str, path: str, headers: Sequence[str]) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {path} HTTP/1.1", *headers, "Connection: close", "Content-Length: 0", "", ""]
    writer.write("\r\n".join(lines).replace("{port}", str(port)).encode())
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    pairs = (line.split(": ", 1) for line in rest)
    return int(first.split()[1]), {name.lower(): value for name, value in pairs}, body


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
async def test_a_page_of_another_site_does_nothing(page: list[str]) -> None:
    reached = _Reached()
    async with _served(reached) as port:
        for method, path in REQUESTS:
            status, headers, body = await _ask(port, method, path, page)
            assert status == 403, (method, path)
            assert "access-control-allow-origin" not in headers
            if method != "HEAD":
                assert json.loads(body)["error"]["code"] == "forbidden", (method, path)
    assert reached.calls == []


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("host", ["rollout.prod.svc.cluster.local:8000", "10.1.2.3", "evil.example"])
async def test_probes_are_answered_by_any_name(bound: str, host: str) -> None:
    """Of load balancers and supervisors; the answer tells no page more than that something listens."""
    async with _served(_Reached(), bound=bound) as port:
        for path in ("/health", "/ready"):
            status, _, body = await _ask(port, "GET", path, [f"Host: {host}", "Origin: http://evil.example"])
            assert status == 200
            assert body == b""


async def test_names_that_the_operator_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """And, beyond the loopback, the machine's own: a page can have none of them."""
    monkeypatch.setattr("socket.getfqdn", lambda: "GPU-7.corp.example")
    own = {"127.0.0.1": [], "0.0.0.0": ["gpu-7.corp.example"]}
    for bound, theirs in own.items():
        settings = ServerSettings(allow_unauthenticated=True, allowed_hosts="Rollout.prod.svc, rollout.prod")
        access = binding.local_access(arguments(host=bound), settings)
        async with _served(_Reached(), access=access) as port:
            for host in ["rollout.prod.svc:8000", "ROLLOUT.PROD", "rollout.prod.svc.", "localhost", *theirs]:
                assert (await _ask(port, "GET", "/v1/models", [f"Host: {host}"]))[0] == 200, host
                page = [f"Host: {host}", "Origin: http://evil.example"]
                assert (await _ask(port, "GET", "/v1/models", page))[0] == 403, host
            for host in ["evil.example", "x.rollout.prod", "rollout.prod.evil.example"]:
                assert (await _ask(port, "GET", "/v1/models", [f"Host: {host}"]))[0] == 403, host
        assert (access.refusal(["gpu-7.corp.example"], [], []) is None) == bool(theirs)


@pytest.mark.parametrize("given", ["http://gpu-1.corp.example", "gpu-1.corp.example:8000", "*", "*.corp.example"])
def test_hosts_are_given_as_names(given: str) -> None:
    with pytest.raises(LockstepError, match="--allowed-hosts"):
        binding.check(arguments(), ServerSettings(allowed_hosts=f"gpu-2,{given}"), None)


async def test_a_websocket_of_another_site_is_refused() -> None:
    reached = _Reached()
    upgrade = ["Upgrade: websocket", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13"]
    async with _served(reached) as port:
        for page in PAGES:
            asked = [*page, *upgrade, "Connection: Upgrade"]
            assert (await _ask(port, "GET", "/v1/realtime", asked))[0] in (400, 403), page
    assert reached.calls == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:{port}", "[::1]:{port}", "LOCALHOST:1"])
async def test_programs_of_this_machine_and_its_own_pages(host: str) -> None:
    async with _served(_Reached()) as port:
        for extra in ([], [f"Origin: http://{host}", "Sec-Fetch-Site: same-origin"], ["Sec-Fetch-Site: none"]):
            headers = [f"Host: {host}", *extra]
            assert (await _ask(port, "GET", "/health", headers))[0] == 200
            assert (await _ask(port, "GET", "/openapi.json", headers))[0] == 200
            assert (await _ask(port, "GET", "/v1/models", headers))[0] == 200


async def test_with_tokens_the_host_is_free() -> None:
    async with _served(_Reached(), Tokens({}, {Role.WEIGHTS: TOKEN})) as port:
        for page in (["Host: gpu-1.corp.example"], ["Host: evil.example", "Origin: http://evil.example"]):
            assert (await _ask(port, "GET", "/v1/models", [*page, f"Authorization: Bearer {TOKEN}"]))[0] == 200
            assert (await _ask(port, "GET", "/v1/models", page))[0] == 401
            assert (await _ask(port, "GET", "/health", page))[0] == 200


async def test_beyond_the_loopback_without_tokens() -> None:
    """With --allow-unauthenticated: other machines use it by address or short name, pages still do not."""
    async with _served(_Reached(), bound="0.0.0.0") as port:
        for host in ("10.1.2.3:8000", "gpu-1:8000", "localhost"):
            assert (await _ask(port, "GET", "/v1/models", [f"Host: {host}"]))[0] == 200
            assert (await _ask(port, "GET", "/v1/models", [f"Host: {host}", "Origin: http://evil.example"]))[0] == 403
        assert (await _ask(port, "GET", "/v1/models", ["Host: evil.example"]))[0] == 403


@pytest.mark.parametrize("origins", [["*"], ["http://localhost:3000"]])
async def test_pages_that_were_asked_for_reach_vllms_routes_only(origins: list[str]) -> None:
    reached, page = _Reached(), ["Host: localhost", "Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"]
    preflight = [*page, "Access-Control-Request-Method: POST"]
    async with _served(reached, origins=origins) as port:
        assert (await _ask(port, "POST", "/v1/completions", page))[0] == 200
        assert (await _ask(port, "OPTIONS", "/v1/completions", preflight))[0] == 200
        reached.calls.clear()
        for method, path in [*REQUESTS, ("OPTIONS", "/v1/generate"), ("OPTIONS", "/v1/drain")]:
            if path not in ("/v1/models", "/v1/completions"):
                assert (await _ask(port, method, path, preflight))[0] == 403, (method, path)
    assert reached.calls == []


@pytest.mark.parametrize("tokens", [None, Tokens({}, {Role.WEIGHTS: TOKEN})], ids=["open", "token"])
async def test_our_paths_never_reach_vllms_cors(tokens: Tokens | None) -> None:
    """Not even for those who may use them, and although vLLM's middleware lets every origin in."""
    own = ["Host: localhost", "Origin: http://localhost", f"Authorization: Bearer {TOKEN}"]
    async with _served(_Reached(), tokens) as port:
        for method, path in REQUESTS:
            if path in ("/v1/models", "/v1/completions", "/metrics", "/start_profile"):
                continue
            asked = [*own, f"Access-Control-Request-Method: {method}"]
            _, headers, _ = await _ask(port, "OPTIONS", path, asked)
            assert not {name for name in headers if name.startswith("access-control")}, path
            _, headers, _ = await _ask(port, method, path, own)
            assert not {name for name in headers if name.startswith("access-control")}, path


def test_a_wildcard_is_said(caplog: pytest.LogCaptureFixture) -> None:
    binding.check(arguments(allowed_origins=["*"]), ServerSettings(), TOKENS)
    assert not caplog.messages
    binding.check(arguments(allowed_origins=["*"]), ServerSettings(), None)
    assert "ANY page" in caplog.messages[0]


def test_origins_are_nobody_unless_asked_for() -> None:
    pytest.importorskip("vllm")
    from rollout_server.cli import parse

    assert parse(["model"])[0].allowed_origins == []
    assert parse(["model", "--allowed-origins", '["http://localhost:3000"]'])[0].allowed_origins == [
        "http://localhost:3000"
    ]
    for given in ('"http://localhost:3000"', "[1]", "{}"):
        with pytest.raises(ValueError, match="JSON list"):
            parse(["model", "--allowed-origins", given])
