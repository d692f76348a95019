"""A push into a slot: what happens to the slot when the push ends early."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from rollout_server.installs.slot_install import InstallContext, SlotInstall
from rollout_server.runs.slots import SlotState
from rollout_server.runs.table import RunTable
from shared.weights import WeightVersion
from tests.support.runs import open_run


class _Call:
    def __init__(self) -> None:
        self.end = asyncio.Event()

    @property
    def done(self) -> bool:
        return self.end.is_set()

    async def ended(self) -> None:
        await self.end.wait()


class _Workers:
    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def __len__(self) -> int:
        return 1

    def begin_each(self, op: str, arguments: list[dict[str, object]]) -> _Call:
        assert op == "fill"
        self.calls.append(_Call())
        return self.calls[-1]


def _install(context: InstallContext, run_id: str) -> SlotInstall:
    run = open_run(context.runs, run_id)
    manifest = SimpleNamespace(checksum="sum", version=WeightVersion(run_id=run_id, step=1))
    header = SimpleNamespace(layout=SimpleNamespace(key="key"), manifest=manifest)
    return SlotInstall(context, run, "lease", header, time.monotonic() + 5, "drain", "http")


async def _fill(install: SlotInstall, end: asyncio.Event) -> None:
    async with install.filling({}):
        await end.wait()


@pytest.fixture
def context() -> InstallContext:
    return InstallContext(SimpleNamespace(), _Workers(), RunTable(1, 2), "boot")


async def test_a_push_cancelled_while_another_run_fills_gives_its_slot_back(context: InstallContext) -> None:
    first, second = _install(context, "a"), _install(context, "b")
    filling = asyncio.ensure_future(_fill(first, asyncio.Event()))
    waiting = asyncio.ensure_future(_fill(second, asyncio.Event()))
    await asyncio.sleep(0.01)
    assert second.run.slots[0].state is SlotState.FILLING
    waiting.cancel()
    await asyncio.wait({waiting})
    assert second.run.slots[0].state is SlotState.FREE
    assert len(context.workers.calls) == 1  # type: ignore[attr-defined]
    assert not context.recoveries
    assert first.run.slots[0].state is SlotState.FILLING
    filling.cancel()
    await asyncio.wait({filling})


async def test_a_slot_that_a_worker_may_be_writing_is_free_when_the_worker_has_ended(context: InstallContext) -> None:
    install = _install(context, "a")
    filling = asyncio.ensure_future(_fill(install, asyncio.Event()))
    await asyncio.sleep(0.01)
    filling.cancel()
    await asyncio.wait({filling})
    (slot,) = install.run.slots
    assert slot.state is SlotState.LOST
    context.workers.calls[0].end.set()  # type: ignore[attr-defined]
    assert await install.run.reserve(time.monotonic() + 5) is slot
    assert not context.recoveries


async def test_a_refused_push_has_given_its_slot_back_when_its_error_is_raised(context: InstallContext) -> None:
    install = _install(context, "a")
    filling = asyncio.ensure_future(_fill(install, asyncio.Event()))
    await asyncio.sleep(0.01)
    context.workers.calls[0].end.set()  # type: ignore[attr-defined]
    filling.cancel()
    await asyncio.wait({filling})
    assert install.run.slots[0].state is SlotState.FREE
    assert not context.recoveries
