"""What the server takes on, and what it refuses before anything is parsed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import Request

from rollout_server.api.middleware.limits import LimitsMiddleware
from rollout_server.api.routes.state import drain
from rollout_server.engine.capacity import Capacity
from rollout_server.settings import ServerSettings
from shared.errors import ErrorCode, LockstepError

SETTINGS = replace(
    ServerSettings(),
    max_requests=2,
    max_sequences=8,
    max_prompts=4,
    max_n=6,
    max_body_mib=1,
    max_bodies_mib=2,
    max_request_tokens=100,
)


@pytest.fixture
def capacity() -> Capacity:
    return Capacity(SETTINGS)


def _client(capacity: Capacity, app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(LimitsMiddleware(app, SETTINGS, capacity))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


async def _length(scope, receive, send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


async def _chunks(count: int, size: int):
    for _ in range(count):
        yield b"x" * size


def test_sequences_are_what_is_bounded(capacity: Capacity) -> None:
    first = capacity.take(2, n=3)
    with pytest.raises(LockstepError) as full:
        capacity.take(1, n=3)
    assert full.value.code is ErrorCode.OVERLOADED
    assert full.value.status == 429
    capacity.take(2)()
    first()
    first()
    assert capacity.sequences == 0, "given back once, however often it is called"


@pytest.mark.parametrize(("prompts", "n", "flag"), [(5, 1, "prompts"), (1, 7, "n"), (3, 3, "sequences")])
def test_what_could_never_be_taken_is_refused_for_good(capacity: Capacity, prompts: int, n: int, flag: str) -> None:
    with pytest.raises(LockstepError, match=f"--max-{flag} ") as refusal:
        capacity.take(prompts, n)
    assert refusal.value.status == 413
    assert capacity.sequences == 0
    capacity.check_tokens(100)
    with pytest.raises(LockstepError, match="--max-request-tokens 100"):
        capacity.check_tokens(101)


def test_memory_that_could_never_be_had_is_refused_for_good(capacity: Capacity) -> None:
    capacity.hold(2 * 2**20)
    with pytest.raises(LockstepError, match="--max-bodies-mib 2;") as refusal:
        capacity.hold(2 * 2**20 + 1)
    assert refusal.value.status == 413
    with pytest.raises(LockstepError) as full:
        capacity.hold(1)
    assert full.value.status == 429


@pytest.mark.parametrize("announced", [True, False])
async def test_bodies_beyond_the_limit(capacity: Capacity, announced: bool) -> None:
    async with _client(capacity, _length) as client:
        small = await client.post("/v1/generate", content=b"x" * 2**20)
        assert small.text == str(2**20)
        body = b"x" * (2**20 + 1) if announced else _chunks(9, 2**17)
        large = await client.post("/v1/chat/completions", content=body)
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "too_large"
        assert (await client.put("/v1/runs/r/adapter", content=_chunks(9, 2**17))).text == str(9 * 2**17)
    assert capacity.requests == 0
    capacity.hold(2 * 2**20)  # nothing was left counted


async def test_requests_and_their_bodies_are_bounded_together(capacity: Capacity) -> None:
    entered, release = asyncio.Semaphore(0), asyncio.Event()

    async def wait(scope, receive, send) -> None:
        entered.release()
        await release.wait()
        await _length(scope, receive, send)

    async with _client(capacity, wait) as client:
        running = [asyncio.ensure_future(client.post("/v1/generate", content=b"{}")) for _ in range(2)]
        for _ in running:
            await entered.acquire()
        refused = await client.post("/v1/score", content=b"{}")
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        running.append(asyncio.ensure_future(client.post("/v1/runs/r/broadcast", content=b"{}")))
        await entered.acquire()  # a push goes through
        release.set()
        assert [(await task).status_code for task in running] == [200] * 3
        capacity.hold(2 * 2**20 - 200)  # parsed, it may take as much
        assert (await client.post("/v1/generate", content=b"x" * 201)).status_code == 429
        assert (await client.post("/v1/generate", content=b"x" * 10)).status_code == 200


async def test_draining_refuses_what_is_new(capacity: Capacity) -> None:
    async def overloaded(scope, receive, send) -> None:
        await JSONResponse({}, status_code=429)(scope, receive, send)

    give_back = capacity.take(1)
    async with _client(capacity, overloaded) as client:
        full = [capacity.take(1) for _ in range(7)]
        assert (await client.post("/v1/completions", content=b"{}")).json()["error"]["code"] == "overloaded"
        assert (await client.put("/v1/runs/r/adapter", content=b"{}")).json() == {}
        for one in full:
            one()
        own = await client.post("/v1/completions", content=b"{}")
        assert own.json() == {}, "vLLM's own 429 says when to come back, too"
        assert own.headers["Retry-After"], "vLLM's own 429 says when to come back, too"
        waiting = asyncio.ensure_future(capacity.drained(60))
        capacity.drain()
        for path in ("/v1/completions", "/v1/runs/r/group"):
            refused = await client.post(path, content=b"{}")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["Retry-After"]
        with pytest.raises(LockstepError, match="about to leave"):
            capacity.take(1)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    give_back()
    assert await waiting
    capacity.sequences = 1
    assert not await capacity.drained(0.1)


async def test_the_drain_route_does_what_sigterm_does(capacity: Capacity) -> None:
    service = SimpleNamespace(proxy=SimpleNamespace(capacity=capacity), state=lambda: capacity.draining)
    assert await drain(service) is True


async def test_sessions_end_under_any_load(capacity: Capacity) -> None:
    """Their records are what a learner waits for, and their ends make room. Calls in them are work like any other."""
    client = _client(capacity, _length)
    full = capacity.take(2, 4)
    for method, path, status in (
        ("DELETE", "/v1/sessions/s", 200),
        ("POST", "/v1/sessions/s/reward", 200),
        ("POST", "/v1/sessions", 429),
        ("POST", "/v1/chat/completions", 429),
    ):
        assert (await client.request(method, path)).status_code == status, path
    full()
    capacity.drain()
    assert (await client.delete("/v1/sessions/s")).status_code == 200
    assert (await client.post("/v1/sessions")).status_code == 503


async def test_what_is_compressed_is_not_taken_for_json(capacity: Capacity) -> None:
    async with _client(capacity, _length) as client:
        answer = await client.post("/v1/completions", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400
        assert "gzip" in answer.json()["error"]["message"]
        assert (await client.post("/v1/score", content=b"{}", headers={"Content-Encoding": "identity"})).text == "2"
