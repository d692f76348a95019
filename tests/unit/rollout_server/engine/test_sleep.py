"""`--share-gpu` on the server's side: who waits while it sleeps, and what becomes of an engine that cannot wake."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.sleep import Sleep
from rollout_server.engine.watchdog import StallWatchdog
from rollout_server.runs.table import RunTable
from shared.errors import ErrorCode, LockstepError


class _Engine:
    """Stands still in vLLM's ways, and gives back 60 bytes; `broken`: raised by the next move."""

    errored = False
    broken: Exception | None = None

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.free = 20
        self.output_processor = SimpleNamespace(request_states={}, propagate_error=lambda error: None)

    async def _call(self, *call: Any) -> None:
        await asyncio.sleep(0.001)
        self.calls.append(call)
        if self.broken:
            raise self.broken

    async def sleep(self, level: int, mode: str) -> None:
        await self._call("sleep", level, mode)
        self.free += 60

    async def wake_up(self, tags: list[str] | None) -> None:
        await self._call("wake", tags)
        self.free -= 60

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        await self._call("pause")

    async def resume_generation(self) -> None:
        await self._call("resume")

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class _Workers:
    """One worker, on the engine's GPU. `writing`: held while an adapter is being written."""

    def __init__(self, engine: _Engine) -> None:
        self.engine, self.writing = engine, asyncio.Lock()

    async def call(self, op: str, timeout: float) -> list[dict[str, Any]]:
        assert op == "free_memory"
        async with self.writing:
            return [{"ok": True, "free": self.engine.free}]


@pytest.fixture
def engine() -> _Engine:
    return _Engine()


@pytest.fixture
def workers(engine: _Engine) -> _Workers:
    return _Workers(engine)


@pytest.fixture
def proxy(engine: _Engine) -> EngineProxy:
    return EngineProxy(engine, RunTable(2, 1))


async def test_the_first_sleep_is_rehearsed_before_anyone_waits(
    engine: _Engine, workers: _Workers, proxy: EngineProxy
) -> None:
    await Sleep(proxy, workers, enabled=True).rehearse()
    assert engine.names() == ["sleep", "wake"]
    assert not proxy.asleep
    for has_nothing_to_move in (Sleep(proxy, workers, enabled=False), Sleep(proxy, workers, enabled=True, level=0)):
        await has_nothing_to_move.rehearse()
    assert engine.names() == ["sleep", "wake"]


async def test_a_learner_that_takes_the_gpu_during_the_rehearsal_wakes_it_later(
    engine: _Engine,
    workers: _Workers,
    proxy: EngineProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = iter([20, 80, 30, 80])  # before the sleep, after it, with the learner's model beside it, and without

    async def call(op: str, timeout: float) -> list[dict[str, Any]]:
        return [{"ok": True, "free": next(free)}]

    monkeypatch.setattr(workers, "call", call)
    sleep = Sleep(proxy, workers, enabled=True)
    with caplog.at_level(logging.WARNING, "lockstep.engine"):
        await sleep.rehearse()
    assert proxy.asleep
    assert "the server sleeps on" in caplog.text
    await sleep.wake()
    assert not proxy.asleep


async def test_a_server_that_is_stopped_during_the_rehearsal_says_nothing_of_a_dead_engine(
    engine: _Engine, workers: _Workers, proxy: EngineProxy
) -> None:
    rehearsal = asyncio.ensure_future(Sleep(proxy, workers, enabled=True).rehearse())
    await asyncio.sleep(0)
    assert proxy.asleep
    rehearsal.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rehearsal
    assert proxy.errored, "half of its memory may be there"


async def test_it_sleeps_and_wakes_once(engine: _Engine, workers: _Workers, proxy: EngineProxy) -> None:
    sleep = Sleep(proxy, workers, enabled=True)
    await asyncio.gather(sleep.fall_asleep(), sleep.fall_asleep())
    assert proxy.asleep
    assert engine.calls == [("sleep", 1, "keep")]
    await asyncio.gather(sleep.wake(), sleep.wake())
    assert not proxy.asleep
    assert engine.calls[1:] == [("wake", None)]


async def test_where_there_is_no_gpu_it_only_stands_still(
    engine: _Engine, workers: _Workers, proxy: EngineProxy
) -> None:
    sleep = Sleep(proxy, workers, enabled=True, level=0)
    await sleep.fall_asleep()
    await sleep.wake()
    assert engine.calls == [("sleep", 0, "keep"), ("wake", ["scheduling"])]


async def test_a_push_wakes_it_and_is_not_slept_through(engine: _Engine, workers: _Workers, proxy: EngineProxy) -> None:
    sleep = Sleep(proxy, workers, enabled=True)
    await sleep.fall_asleep()
    async with sleep.kept_awake():
        assert not proxy.asleep
        again = asyncio.ensure_future(sleep.fall_asleep())
        await asyncio.sleep(0.01)
        assert not proxy.asleep
        async with proxy.paused(clear_cache=True):
            assert engine.names()[-1] == "pause"
    await again
    assert proxy.asleep
    assert engine.names() == ["sleep", "wake", "pause", "resume", "sleep"]


async def test_nobody_ends_its_sleep_by_a_pause(engine: _Engine, workers: _Workers, proxy: EngineProxy) -> None:
    """What ends a pause of vLLM's ends every pause."""
    sleep = Sleep(proxy, workers, enabled=True)
    await sleep.fall_asleep()

    async def pause() -> None:
        async with proxy.paused(clear_cache=False):
            pass

    waiting = asyncio.ensure_future(pause())
    await asyncio.sleep(0.01)
    assert engine.names() == ["sleep"]
    await sleep.wake()
    await waiting
    assert engine.names() == ["sleep", "wake", "pause", "resume"]


async def test_one_pause_after_another(engine: _Engine, workers: _Workers, proxy: EngineProxy) -> None:
    async def pause() -> None:
        async with proxy.paused(clear_cache=False):
            await asyncio.sleep(0.005)

    await asyncio.gather(pause(), pause())
    assert engine.names() == ["pause", "resume"] * 2


async def test_memory_that_others_hold_is_not_taken(engine: _Engine, workers: _Workers, proxy: EngineProxy) -> None:
    """vLLM would take a part of it, and die."""
    sleep = Sleep(proxy, workers, enabled=True)
    await sleep.fall_asleep()
    engine.free -= 30
    with pytest.raises(LockstepError, match=r"sleeps on.*--gpu-memory-utilization"):
        async with sleep.kept_awake():
            pytest.fail("there is nothing to write to")
    assert proxy.asleep
    assert not proxy.errored
    engine.free += 20  # what is left of it was free before
    await sleep.wake()
    assert not proxy.asleep
    assert engine.names() == ["sleep", "wake"]


async def test_a_write_that_outlived_its_push_is_waited_for(
    engine: _Engine, workers: _Workers, proxy: EngineProxy
) -> None:
    sleep = Sleep(proxy, workers, enabled=True)
    async with workers.writing:
        asked = asyncio.ensure_future(sleep.fall_asleep())
        await asyncio.sleep(0.01)
        assert engine.calls == []
    await asked
    assert proxy.asleep


@pytest.mark.parametrize("what", ["fall asleep", "wake up"])
async def test_an_engine_that_does_not_do_it_ends_the_server(
    engine: _Engine, workers: _Workers, proxy: EngineProxy, what: str
) -> None:
    sleep = Sleep(proxy, workers, enabled=True)
    if what == "wake up":
        await sleep.fall_asleep()
    engine.broken = RuntimeError("CUDA error")
    with pytest.raises(LockstepError, match=f"did not {what}: RuntimeError CUDA error") as failure:
        await (sleep.wake() if what == "wake up" else sleep.fall_asleep())
    assert failure.value.code is ErrorCode.ENGINE_DEAD
    assert proxy.errored


async def test_a_sleeping_engine_does_not_hang(
    engine: _Engine, workers: _Workers, proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("rollout_server.engine.watchdog.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(EngineProxy, "output_tokens", lambda self: {("held", 0): 3})
    stall, sleep = StallWatchdog(proxy, 30.0), Sleep(proxy, workers, enabled=True)

    def look_for(seconds: int) -> None:
        for _ in range(seconds):
            now[0] += 1.0
            stall.look()

    await sleep.fall_asleep()
    look_for(200)
    assert not proxy.errored
    await sleep.wake()
    look_for(100)
    assert proxy.errored


async def test_a_server_with_a_gpu_of_its_own_refuses(engine: _Engine, workers: _Workers, proxy: EngineProxy) -> None:
    sleep = Sleep(proxy, workers, enabled=False)
    for order in (sleep.fall_asleep, sleep.wake):
        with pytest.raises(LockstepError, match="--share-gpu"):
            await order()
    async with sleep.kept_awake(), sleep.kept_awake():  # pushes of two runs, side by side
        assert engine.calls == []
