"""`--share-gpu` on the server's side: who waits while it sleeps, and what becomes of an engine that cannot wake."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.engine import EngineDoor
from rollout_server.run_table import RunTable
from rollout_server.sleep import Sleep
from rollout_server.stall import Stall
from shared.errors import ErrorCode, LockstepError


class _Engine:
    """Stands still in vLLM's ways; `broken`: raised by the next move."""

    errored = False
    broken: Exception | None = None

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.output_processor = SimpleNamespace(request_states={}, propagate_error=lambda error: None)

    async def _call(self, *call: Any) -> None:
        await asyncio.sleep(0.001)
        self.calls.append(call)
        if self.broken:
            raise self.broken

    async def sleep(self, level: int, mode: str) -> None:
        await self._call("sleep", level, mode)

    async def wake_up(self, tags: list[str] | None) -> None:
        await self._call("wake", tags)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        await self._call("pause")

    async def resume_generation(self) -> None:
        await self._call("resume")

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def engine() -> _Engine:
    return _Engine()


@pytest.fixture
def door(engine: _Engine) -> EngineDoor:
    return EngineDoor(engine, RunTable(2, 1))


async def test_it_sleeps_and_wakes_once(engine: _Engine, door: EngineDoor) -> None:
    sleep = Sleep(door, enabled=True)
    await asyncio.gather(sleep.fall_asleep(), sleep.fall_asleep())
    assert door.asleep and engine.calls == [("sleep", 1, "keep")]
    await asyncio.gather(sleep.wake(), sleep.wake())
    assert not door.asleep and engine.calls[1:] == [("wake", None)]


async def test_where_there_is_no_gpu_it_only_stands_still(engine: _Engine, door: EngineDoor) -> None:
    sleep = Sleep(door, enabled=True, level=0)
    await sleep.fall_asleep()
    await sleep.wake()
    assert engine.calls == [("sleep", 0, "keep"), ("wake", ["scheduling"])]


async def test_a_push_wakes_it_and_is_not_slept_through(engine: _Engine, door: EngineDoor) -> None:
    sleep = Sleep(door, enabled=True)
    await sleep.fall_asleep()
    async with sleep.kept_awake():
        assert not door.asleep
        again = asyncio.ensure_future(sleep.fall_asleep())
        await asyncio.sleep(0.01)
        assert not door.asleep
        async with door.paused(clear_cache=True):
            assert engine.names()[-1] == "pause"
    await again
    assert door.asleep and engine.names() == ["sleep", "wake", "pause", "resume", "sleep"]


async def test_nobody_ends_its_sleep_by_a_pause(engine: _Engine, door: EngineDoor) -> None:
    """What ends a pause of vLLM's ends every pause."""
    sleep = Sleep(door, enabled=True)
    await sleep.fall_asleep()

    async def pause() -> None:
        async with door.paused(clear_cache=False):
            pass

    waiting = asyncio.ensure_future(pause())
    await asyncio.sleep(0.01)
    assert engine.names() == ["sleep"]
    await sleep.wake()
    await waiting
    assert engine.names() == ["sleep", "wake", "pause", "resume"]


async def test_one_pause_after_another(engine: _Engine, door: EngineDoor) -> None:
    async def pause() -> None:
        async with door.paused(clear_cache=False):
            await asyncio.sleep(0.005)

    await asyncio.gather(pause(), pause())
    assert engine.names() == ["pause", "resume"] * 2


async def test_an_engine_that_cannot_wake_ends_the_server(engine: _Engine, door: EngineDoor) -> None:
    sleep = Sleep(door, enabled=True)
    await sleep.fall_asleep()
    engine.broken = RuntimeError("CUDA out of memory")
    with pytest.raises(LockstepError, match=r"out of memory.*--gpu-memory-utilization") as failure:
        await sleep.wake()
    assert failure.value.code is ErrorCode.ENGINE_DEAD and door.errored


async def test_a_sleeping_engine_does_not_hang(
    engine: _Engine, door: EngineDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("rollout_server.stall.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(EngineDoor, "output_tokens", lambda self: {("held", 0): 3})
    stall, sleep = Stall(door, 30.0), Sleep(door, enabled=True)

    def look_for(seconds: int) -> None:
        for _ in range(seconds):
            now[0] += 1.0
            stall.look()

    await sleep.fall_asleep()
    look_for(200)
    assert not door.errored
    await sleep.wake()
    look_for(100)
    assert door.errored


async def test_a_server_with_a_gpu_of_its_own_refuses(engine: _Engine, door: EngineDoor) -> None:
    sleep = Sleep(door, enabled=False)
    for order in (sleep.fall_asleep, sleep.wake):
        with pytest.raises(LockstepError, match="--share-gpu"):
            await order()
    async with sleep.kept_awake(), sleep.kept_awake():  # pushes of two runs, side by side
        assert engine.calls == []
