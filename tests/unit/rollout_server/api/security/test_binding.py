"""What a server refuses before it loads a model, and what TLS looks like from both ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from fastapi.responses import JSONResponse

from learner.servers.client import RolloutClient
from rollout_server.api.middleware.auth import AuthMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.security import binding
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import Role
from rollout_server.api.server import HttpServer
from rollout_server.settings import ServerSettings
from shared.errors import ErrorCode, LockstepError
from shared.weights import RunState

TOKEN = "a token for tests".replace(" ", "-")
TOKENS = Tokens({}, {Role.WEIGHTS: TOKEN})


def arguments(**given: Any) -> SimpleNamespace:
    """vLLM's flags as the parser leaves them."""
    defaults = {
        "host": "127.0.0.1",
        "port": 8000,
        "api_key": None,
        "ssl_keyfile": None,
        "ssl_certfile": None,
        "ssl_ca_certs": None,
        "ssl_cert_reqs": 0,
        "ssl_ciphers": None,
    }
    return SimpleNamespace(**{**defaults, **given})


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A private CA, a certificate of this machine from it, and a CA of somebody else."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return SimpleNamespace(**{name: str(folder / f"{name}.pem") for name in ("ca", "other", "key", "cert")})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", None, "10.1.2.3", "gpu-1"])
def test_beyond_this_machine_only_with_a_token(host: str | None, pems, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LockstepError, match=r"--token-file FILE .*--allow-unauthenticated"):
        binding.check(arguments(host=host), ServerSettings(), None)
    binding.check(arguments(host=host), ServerSettings(allow_unauthenticated=True), None)
    assert "ANYONE" in caplog.messages.pop()
    caplog.clear()
    binding.check(arguments(host=host), ServerSettings(), TOKENS)
    assert "unencrypted" in caplog.messages.pop()
    caplog.clear()
    binding.check(arguments(host=host, ssl_certfile=pems.cert, ssl_keyfile=pems.key), ServerSettings(), TOKENS)
    binding.check(arguments(host="::1"), ServerSettings(), None)
    assert not caplog.messages


def test_protection_that_only_seems_to_be_one_is_refused(monkeypatch: pytest.MonkeyPatch, pems, tmp_path: Path) -> None:
    wrong = [
        (arguments(api_key=["secret"]), "--token-file"),
        (arguments(ssl_keyfile=pems.key), "--ssl-certfile"),
        (arguments(ssl_certfile=pems.cert, ssl_keyfile=pems.key, ssl_cert_reqs=2), "--ssl-cert-reqs"),
        (arguments(ssl_certfile=pems.cert, ssl_keyfile=str(tmp_path / "none")), "none"),
        (arguments(ssl_certfile=pems.cert, ssl_keyfile=pems.cert), "TLS cannot work"),
        (arguments(ssl_certfile=pems.ca, ssl_keyfile=pems.key), "TLS cannot work"),
    ]
    for args, word in wrong:
        with pytest.raises(LockstepError, match=word):
            binding.check(args, ServerSettings(), TOKENS)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(LockstepError, match="--token-file"):
        binding.check(arguments(), ServerSettings(), TOKENS)


async def _run_state(scope: Any, receive: Any, send: Any) -> None:
    state = RunState(run_id="r", version=None, checksum=None, install_seq=None, slots=[], running_requests=0)
    await JSONResponse(state.model_dump())(scope, receive, send)


@contextlib.asynccontextmanager
async def _served(app: Any = _run_state, **tls: Any) -> AsyncIterator[str]:
    """`host:port` of a real server behind both middlewares."""
    readiness = ReadinessMiddleware()
    readiness.open(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = HttpServer(
            AuthMiddleware(readiness, TOKENS), log_level="error", **binding.tls_options(arguments(**tls))
        )
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def _ask(url: str, token: str | None = TOKEN, **options: Any) -> Any:
    def ask() -> Any:
        with RolloutClient(url, token, **options) as client:
            return client.run("r")

    return await asyncio.to_thread(ask)


async def _refused(url: str, token: str | None = TOKEN, **options: Any) -> LockstepError:
    with pytest.raises(LockstepError) as refusal:
        await _ask(url, token, **options)
    return refusal.value


async def test_a_private_ca(pems, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _served(ssl_certfile=pems.cert, ssl_keyfile=pems.key) as address:
        assert (await _ask(f"https://{address}", ca_file=pems.ca)).run_id == "r"
        for options in ({}, {"ca_file": pems.other}):
            error = await _refused(f"https://{address}", **options)
            assert error.code is ErrorCode.INVALID_REQUEST
            assert "ca_file" in error.message
        assert (await _refused(f"https://{address}", None, ca_file=pems.ca)).code is ErrorCode.UNAUTHENTICATED
        assert (await _refused(f"https://{address}", "wrong" * 4, ca_file=pems.ca)).code is ErrorCode.UNAUTHENTICATED
        assert (await _refused(f"http://{address}")).code is ErrorCode.NOT_READY
        with RolloutClient(f"https://{address}", TOKEN) as client, pytest.raises(LockstepError, match="ca_file"):
            await asyncio.to_thread(client.wait_ready, 60.0)  # at once: waiting does not make it trusted
        monkeypatch.setenv("SSL_CERT_FILE", pems.ca)
        assert (await _ask(f"https://{address}")).run_id == "r"


async def test_a_push_without_the_token_gets_its_answer() -> None:
    """Although the server reads nothing of what is being sent."""

    async def unreachable(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the app")

    async with _served(unreachable) as address:
        for token in (None, "wrong" * 4):
            with RolloutClient(f"http://{address}", token) as client, pytest.raises(LockstepError) as refusal:
                await asyncio.to_thread(client.push, "r", [bytes(2**25)], "a lease of tests")
            assert refusal.value.code is ErrorCode.UNAUTHENTICATED


async def test_https_to_a_server_without_tls(pems) -> None:
    async with _served() as address:
        error = await _refused(f"https://{address}", ca_file=pems.ca)
    assert error.code is ErrorCode.INVALID_REQUEST
    assert "http://" in error.message


def test_a_ca_file_that_holds_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for path in ("ca.pem", "missing.pem"):
        with pytest.raises(LockstepError, match="ca_file"):
            RolloutClient("https://host", ca_file=str(tmp_path / path))


def test_a_token_that_everyone_can_read_is_said() -> None:
    with pytest.warns(UserWarning, match="unencrypted"):
        RolloutClient("http://gpu-1:8000", TOKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RolloutClient("http://gpu-1:8000")
        RolloutClient("http://localhost:8000", TOKEN)
        RolloutClient("https://gpu-1:8000", TOKEN)
