"""Groups as they finish, heartbeats in between, and work that ends with its client."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.api.responses import Ndjson
from rollout_server.api.routes.generate import _in_order, _lines
from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import EngineProxy
from rollout_server.generation import requests
from rollout_server.runs.table import RunTable
from rollout_server.vllm_compat import versions
from shared.errors import ErrorCode, InvalidRequest, LockstepError, Overloaded, UnknownRun
from shared.rollouts import GenerateRequest, RolloutGroup


class _Work:
    """Two groups, the second one first, once `release` is set; counts how much of it was cancelled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cancelled = 0
        self.error: Exception | None = None
        self.starts, self.release = asyncio.Event(), asyncio.Event()
        self.starts.set()
        monkeypatch.setattr(requests, "_start", self._start)

    async def _start(self, *_: Any) -> list[asyncio.Future[RolloutGroup]]:
        await self._wait(self.starts)
        if self.error:
            raise self.error
        return [asyncio.ensure_future(self._group(index)) for index in (0, 1)]

    async def _group(self, index: int) -> RolloutGroup:
        if index == 0:
            await self._wait(self.release)
        return RolloutGroup(prompt_index=index, prompt_token_ids=[index], completions=[])

    async def _wait(self, event: asyncio.Event) -> None:
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def groups(self) -> Any:
        return requests.generate(*[None] * 3)  # type: ignore[arg-type]


@pytest.fixture
async def work(monkeypatch: pytest.MonkeyPatch) -> _Work:
    return _Work(monkeypatch)


async def test_groups_in_the_order_they_finish(work: _Work) -> None:
    groups = work.groups()
    assert await anext(groups) is None, "it runs"
    assert (await anext(groups)).prompt_index == 1
    work.release.set()
    assert (await anext(groups)).prompt_index == 0
    with pytest.raises(StopAsyncIteration):
        await anext(groups)
    assert [b'"prompt_index":%d' % i in group for i, group in enumerate(await _in_order(work.groups()))] == [True] * 2


async def test_a_stream_is_never_silent_for_long(work: _Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "HEARTBEAT_SECONDS", 0.02)
    work.starts.clear()
    lines = _lines(work.groups(), "e")
    assert await anext(lines) == b"" == await anext(lines), "while it waits to be admitted"
    work.starts.set()
    while not (line := await anext(lines)):
        pass
    assert b"prompt_index" in line
    assert await anext(lines) == b"" == await anext(lines), "while its groups are generated"
    work.release.set()
    assert b"prompt_index" in await anext(lines)
    assert await anext(lines) == b'{"done":true,"epoch":"e"}'


async def test_a_refusal_comes_before_the_first_line(work: _Work) -> None:
    work.error = UnknownRun("no such run")
    with pytest.raises(LockstepError, match="no such run"):
        await Ndjson.begin(_lines(work.groups(), "e"))
    work.error = RuntimeError("a bug")
    with pytest.raises(LockstepError, match="generation failed: RuntimeError: a bug") as failure:
        await _in_order(work.groups())
    assert failure.value.code is ErrorCode.ENGINE_DEAD


async def test_a_failure_ends_the_stream_and_its_other_groups(work: _Work, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(index: int) -> RolloutGroup:
        if index == 1:
            await asyncio.sleep(0.02)
            raise UnknownRun("gone")
        return await _Work._group(work, index)

    monkeypatch.setattr(work, "_group", fail)
    assert [line async for line in (await Ndjson.begin(_lines(work.groups(), "e"))).body_iterator] == [
        UnknownRun("gone").body().model_dump_json().encode() + b"\n"
    ]
    assert work.cancelled == 1


@pytest.mark.parametrize("started", [False, True])
async def test_work_ends_with_its_client(work: _Work, started: bool) -> None:
    if not started:
        work.starts.clear()
    reading = asyncio.ensure_future(_in_order(work.groups()))
    await asyncio.sleep(0.02)
    await _cancelled(reading)
    assert work.cancelled == 1
    assert len(asyncio.all_tasks()) == 1, "nothing is left"


async def test_work_that_starts_while_its_client_leaves_ends_too(work: _Work) -> None:
    work.starts.clear()
    reading = asyncio.ensure_future(_in_order(work.groups()))
    await asyncio.sleep(0.02)
    work.starts.set()
    await asyncio.sleep(0)
    await _cancelled(reading)
    assert work.cancelled == 1
    assert len(asyncio.all_tasks()) == 1, "nothing is left"


@pytest.mark.parametrize("when", ["before its body begins", "while it waits for a group"])
async def test_a_stream_whose_client_leaves_ends_its_work(work: _Work, when: str) -> None:
    """Starlette cancels its body again at every `await`, also at those that clean up."""
    stream = await Ndjson.begin(_lines(work.groups(), "epoch"))
    gone = asyncio.Event()

    async def receive() -> dict:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if when == "before its body begins":
            gone.set()
            await asyncio.Event().wait()
        elif message.get("body"):
            asyncio.get_running_loop().call_later(0.02, gone.set)

    with contextlib.suppress(asyncio.CancelledError):
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    await asyncio.sleep(0.02)
    assert work.cancelled == 1
    assert len(asyncio.all_tasks()) == 1, "nothing is left"


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def _proxy(generate: Any) -> EngineProxy:
    """Return a proxy of an engine that generates so."""
    model = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 10**6)
    return EngineProxy(SimpleNamespace(generate=generate, errored=False, model_config=model), RunTable(2, 1))


def _body(prompts: int) -> GenerateRequest:
    """Return a request of this many prompts, each of the token that is its index."""
    return GenerateRequest.model_validate({"prompts": [{"token_ids": [i]} for i in range(prompts)], "policy": "base"})


async def test_nothing_more_is_submitted_for_a_request_that_has_failed() -> None:
    submitted: list[int] = []

    async def generate(prompt: Any, params: Any, request_id: str, **kwargs: Any) -> Any:
        submitted.append(prompt["prompt_token_ids"][0])
        if len(submitted) == 3:
            raise UnknownRun("refused by the engine")
        await asyncio.Event().wait()
        yield

    proxy, body = _proxy(generate), _body(1000)
    with pytest.raises(UnknownRun, match="refused by the engine"):
        await _in_order(requests.generate(body, proxy, Exclusive(proxy, enabled=False)))
    assert len(submitted) < 10
    assert proxy.capacity.sequences == 0


@pytest.mark.skipif(not versions.overload_errors(), reason="a vLLM without limits of its own")
@pytest.mark.parametrize("index", [0, 2])
async def test_what_the_engine_refuses_at_once_comes_before_the_first_line(index: int) -> None:
    async def generate(prompt: Any, params: Any, request_id: str, **kwargs: Any) -> Any:
        if prompt["prompt_token_ids"] == [index]:
            raise versions.overload_errors()[0]
        await asyncio.Event().wait()
        yield

    proxy, body = _proxy(generate), _body(3)
    with pytest.raises(Overloaded, match="--max-num-queued-reqs"):
        await anext(requests.generate(body, proxy, Exclusive(proxy, enabled=False)))
    assert proxy.capacity.sequences == 0


async def test_text_for_a_server_without_tokenizer() -> None:
    def none() -> Any:
        raise ValueError("Tokenizer not available when `skip_tokenizer_init=True`")

    proxy = EngineProxy(SimpleNamespace(get_tokenizer=none, errored=False), RunTable(2, 1))
    body = GenerateRequest.model_validate({"prompts": [{"text": "hello"}], "policy": "base"})
    with pytest.raises(InvalidRequest, match="send token ids"):
        await _in_order(requests.generate(body, proxy, Exclusive(proxy, enabled=False)))
