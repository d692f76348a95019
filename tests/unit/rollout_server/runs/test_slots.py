"""The ring of slots on its own: who may be refilled when, and who gets what."""

from __future__ import annotations

import asyncio
import time

import pytest

from rollout_server.runs.slots import Run, Slot, SlotState
from rollout_server.runs.table import RunTable
from shared.errors import ErrorCode, LockstepError
from shared.weights import WeightVersion


def _version(step: int) -> WeightVersion:
    return WeightVersion(run_id="r", step=step)


async def _install(table: RunTable, run: Run, step: int) -> Slot:
    slot = await run.reserve(time.monotonic() + 1)
    run.flip(slot, _version(step), table.next_install_seq(), f"sum{step}")
    return slot


async def test_a_slot_in_use_is_never_refilled() -> None:
    table = RunTable(slots_per_run=2, max_runs=1)
    run = table.open("r", "lease", takeover=False)
    first = await _install(table, run, 0)
    run.acquire(first, "request")
    second = await _install(table, run, 1)
    assert first.state is SlotState.DRAINING
    assert run.active is second
    with pytest.raises(LockstepError) as refusal:
        await run.reserve(time.monotonic() + 0.05)
    assert refusal.value.code is ErrorCode.NO_FREE_SLOT
    waiting = asyncio.ensure_future(run.reserve(time.monotonic() + 5))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    run.release(first, "request")
    assert (await waiting) is first
    assert run.active is second, "the version served must not change while the other slot is filled"


async def test_salts_never_repeat() -> None:
    table = RunTable(2, 1)
    run = table.open("r", "lease", takeover=False)
    salts = [(await _install(table, run, step)).salt for step in range(10)]
    assert len(set(salts)) == 10


async def test_a_lost_slot_stays_out_until_it_is_given_back() -> None:
    table = RunTable(2, 1)
    run = table.open("r", "lease", takeover=False)
    await _install(table, run, 0)
    slot = await run.reserve(time.monotonic() + 1)
    run.give_back(slot, lost=True)
    with pytest.raises(LockstepError):
        await run.reserve(time.monotonic() + 0.05)
    run.give_back(slot)
    assert await run.reserve(time.monotonic() + 1) is slot


async def test_leases_and_takeover() -> None:
    table = RunTable(2, 1)
    table.open("r", "mine", takeover=False)
    with pytest.raises(LockstepError) as refusal:
        table.open("r", "yours", takeover=False)
    assert refusal.value.code is ErrorCode.LEASE_MISMATCH
    assert table.open("r", "yours", takeover=True).lease == "yours"
    with pytest.raises(LockstepError) as refusal:
        table.open("other", "x", takeover=False)
    assert refusal.value.code is ErrorCode.NO_FREE_RUN
    table.open("other", "x", takeover=True)
    assert list(table.runs) == ["other"]


async def test_a_new_run_waits_for_the_old_ones_requests() -> None:
    table = RunTable(1, 1)
    old = table.open("old", "x", takeover=False)
    slot = await _install(table, old, 0)
    old.acquire(slot, "request")
    table.close("old")
    new = table.open("new", "y", takeover=False)
    waiting = asyncio.ensure_future(new.reserve(time.monotonic() + 5))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    old.release(slot, "request")
    assert await waiting is slot


async def test_runs_have_slots_of_their_own() -> None:
    table = RunTable(2, 3)
    rings = [table.open(name, "x", takeover=False).slots for name in "abc"]
    assert sorted(slot.slot_id for ring in rings for slot in ring) == [1, 2, 3, 4, 5, 6]


async def test_waiting_for_a_step() -> None:
    table = RunTable(2, 1)
    run = table.open("r", "lease", takeover=False)
    waiting = asyncio.ensure_future(run.wait_for_step(1, wait_s=5))
    await _install(table, run, 0)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await _install(table, run, 1)
    await waiting
    with pytest.raises(LockstepError) as refusal:
        await run.wait_for_step(9, wait_s=0.02)
    assert refusal.value.code is ErrorCode.STEP_NOT_REACHED


async def test_versions_are_ordered_by_fence_then_step() -> None:
    assert WeightVersion(run_id="r", fence=1, step=0) > WeightVersion(run_id="r", fence=0, step=9)
    with pytest.raises(ValueError, match="different runs"):
        _ = _version(1) < WeightVersion(run_id="s", step=2)
