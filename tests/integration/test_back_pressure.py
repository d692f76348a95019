"""A server with small limits: refusals, release of resources, and a stalled engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.servers.client import RolloutClient
from shared.errors import ErrorCode
from shared.rollouts import GenerateRequest, Prompt, ScoreRequest
from shared.sampling import SamplingParams
from tests.integration.conftest import FLAGS
from tests.integration.support.server import HTTP, ServerProcess, running_server
from tests.integration.support.waiting import until

STALL_S = 12.0
LIMITS = [
    "--max-body-mib",
    "1",
    "--max-sequences",
    "40",
    "--max-n",
    "36",
    "--max-prompts",
    "16",
    "--max-request-tokens",
    "37000",
    "--engine-stall-seconds",
    str(STALL_S),
]
PROMPT = [5, 17, 99, 260, 41]
#: Seconds of work, even where a step takes a fraction of a millisecond.
LONG = {
    "prompts": [{"token_ids": PROMPT}],
    "policy": "base",
    "sampling": {"n": 36, "max_tokens": 1000, "ignore_eos": True},
}
SHORT = {"prompts": [{"token_ids": PROMPT}], "policy": "base", "sampling": {"n": 5, "max_tokens": 4}}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(model, tmp_path_factory.mktemp("limits"), *FLAGS, *LIMITS) as process:
        yield process


@pytest.fixture(autouse=True)
def left_as_it_was(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[None]:
    """Wait until no request is left in our counts and in vLLM's, which are those of its last step."""
    yield
    if "hangs" not in request.node.name:
        until(lambda: server.metric("lockstep_sequences") == 0)
        assert _post(server, {**SHORT, "sampling": {"max_tokens": 1}}).status_code == 200
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            until(lambda name=name: server.metric(name) == 0)


def _post(server: ServerProcess, body: dict, path: str = "/v1/generate", **kw) -> httpx.Response:
    return HTTP.post(server.url + path, json=body, **kw)


def _sent(server: ServerProcess, body: dict, path: str = "/v1/generate") -> socket.socket:
    """Send a request and return its connection."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def test_what_is_too_large(server: ServerProcess) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    cases = [
        (_post(server, {**SHORT, "chat_template_kwargs": {"x": "y" * 2**20}}), "--max-body-mib"),
        (HTTP.post(server.url + "/v1/score", content=chunks()), "--max-body-mib"),
        (HTTP.post(server.url + "/v1/completions", content=chunks()), "--max-body-mib"),
        (_post(server, {**SHORT, "prompts": SHORT["prompts"] * 17}), "--max-prompts"),
        (_post(server, {**SHORT, "sampling": {"n": 37}}), "--max-n"),
        (_post(server, {**SHORT, "prompts": SHORT["prompts"] * 9}), "--max-sequences"),
        (_post(server, {**LONG, "sampling": {"n": 40, "max_tokens": 1000}}), "--max-n"),
        (
            _post(server, {**LONG, "prompts": LONG["prompts"] * 4, "sampling": {"n": 10, "max_tokens": 1000}}),
            "--max-request-tokens",
        ),
        (_post(server, {"sequences": [PROMPT] * 17, "policy": "base"}, "/v1/score"), "--max-prompts"),
    ]
    for answer, flag in cases:
        assert answer.status_code == 413, (flag, answer.text[:300])
        assert answer.json()["error"]["code"] == "too_large"
        assert flag in answer.json()["error"]["message"]
    theirs = _post(server, {**CHAT, "n": 37}, "/v1/chat/completions")
    assert theirs.status_code == 413
    assert "--max-n" in theirs.json()["error"]["message"]


def test_too_much_at_once(server: ServerProcess) -> None:
    many = {**CHAT, "n": 5}
    request = GenerateRequest(
        prompts=[Prompt(token_ids=PROMPT)], policy="base", sampling=SamplingParams(n=5, max_tokens=4)
    )
    with RolloutClient(server.url) as client, ThreadPoolExecutor() as pool:
        with server.frozen_engine():
            long = _sent(server, LONG)
            until(lambda: server.metric("lockstep_sequences") == 36)
            for body, path in (
                (SHORT, "/v1/generate"),
                ({**SHORT, "stream": True}, "/v1/generate"),
                ({"sequences": [PROMPT] * 5, "policy": "base"}, "/v1/score"),
                (many, "/v1/chat/completions"),
                ({"model": "base", "prompt": [PROMPT] * 5, "max_tokens": 4}, "/v1/completions"),
            ):
                answer = _post(server, body, path)
                assert answer.status_code == 429, (path, answer.text[:300])
                assert answer.headers["Retry-After"] == "1", (path, answer.text[:300])
                assert "--max-sequences" in answer.json()["error"]["message"]
                until(lambda: server.metric("lockstep_sequences") == 36)
            full = _sent(server, {**LONG, "sampling": {**LONG["sampling"], "n": 4}})
            until(lambda: server.metric("lockstep_sequences") == 40)
            streamed = _post(server, {**CHAT, "stream": True}, "/v1/chat/completions")
            assert streamed.status_code == 429, "before its first byte"
            waiting: list[Future[Any]] = [
                pool.submit(client.generate, request),
                pool.submit(lambda: list(client.iter_groups(request))),
                pool.submit(client.score, ScoreRequest(sequences=[PROMPT], policy="base")),
            ]
            time.sleep(0.3)
            assert not any(future.done() for future in waiting), "a learner waits"
            long.close()
            full.close()
        for future in waiting:
            future.result(60)


@pytest.mark.parametrize("case", ["json", "stream", "before-the-first-byte", "score", "chat", "chat-stream"])
def test_a_client_that_leaves_frees_the_engine(server: ServerProcess, case: str) -> None:
    body, path = dict(LONG), "/v1/generate"
    if case in ("stream", "before-the-first-byte"):
        body |= {"stream": True}
    elif case == "score":
        body, path = {"sequences": [[i] * 1000 for i in range(3, 18)], "policy": "base"}, "/v1/score"
    elif case.startswith("chat"):
        body = {**CHAT, "n": 36, "max_tokens": 900, "ignore_eos": True, "stream": case == "chat-stream"}
        path = "/v1/chat/completions"
    streamed = case in ("stream", "chat-stream")
    with server.frozen_engine():  # or a fast machine has done it all before the client leaves
        connection = _sent(server, body, path)
        if case != "before-the-first-byte":
            until(lambda: server.metric("lockstep_sequences") > 0)
        if not streamed:
            _left(server, connection)
    if streamed:
        connection.recv(1)
        with server.frozen_engine():
            _left(server, connection)


def _left(server: ServerProcess, connection: socket.socket) -> None:
    """Disconnect, and check that nothing is held for the request at once, while the engine is stopped."""
    connection.close()
    until(lambda: server.metric("lockstep_sequences") == 0)


def test_an_engine_that_hangs_ends_the_server(server: ServerProcess) -> None:
    """The last test of this file, since it ends the server."""
    engines = server.engine_processes()
    with server.frozen_engine(), ThreadPoolExecutor() as pool:
        stopped = time.monotonic()
        ours = pool.submit(_post, server, LONG)
        theirs = pool.submit(_post, server, {**CHAT, "max_tokens": 900, "ignore_eos": True}, "/v1/chat/completions")
        assert ours.result(STALL_S * 3).json()["error"]["code"] == ErrorCode.ENGINE_DEAD
        assert theirs.result(STALL_S).status_code == 503
        assert time.monotonic() - stopped >= STALL_S
        assert server.process.wait(30) == 1
    assert "the engine died" in server.tail()
    assert "--engine-stall-seconds" in server.tail()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in engines))
