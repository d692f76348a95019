"""The ring of slots on its own: who may be refilled when, and who gets what."""

from __future__ import annotations

import asyncio
import time

import pytest

from rollout_server.runs.slots import Run, Slot, SlotState
from rollout_server.runs.table import RunTable
from shared.errors import ErrorCode, LockstepError
from shared.weights import WeightVersion
from tests.support.runs import open_run


def _version(step: int) -> WeightVersion:
    return WeightVersion(run_id="r", step=step)


async def _install(table: RunTable, run: Run, step: int) -> Slot:
    slot = await run.reserve(time.monotonic() + 1)
    run.flip(slot, _version(step), table.next_install_seq(), f"sum{step}")
    return slot


async def test_a_slot_in_use_is_never_refilled() -> None:
    table = RunTable(slots_per_run=2, max_runs=1)
    run = open_run(table, "r")
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
    run = open_run(table, "r")
    salts = [(await _install(table, run, step)).salt for step in range(10)]
    assert len(set(salts)) == 10


async def test_a_lost_slot_stays_out_until_it_is_given_back() -> None:
    table = RunTable(2, 1)
    run = open_run(table, "r")
    await _install(table, run, 0)
    slot = await run.reserve(time.monotonic() + 1)
    run.give_back(slot, lost=True)
    with pytest.raises(LockstepError):
        await run.reserve(time.monotonic() + 0.05)
    run.give_back(slot)
    assert await run.reserve(time.monotonic() + 1) is slot


async def _refused(table: RunTable, run_id: str, lease: str, *, takeover: bool = False) -> ErrorCode:
    with pytest.raises(LockstepError) as refusal:
        async with table.opened(run_id, lease, takeover):
            pytest.fail("it may not be pushed to")
    return refusal.value.code


async def test_a_run_belongs_to_who_has_flipped_last() -> None:
    table = RunTable(2, 1)
    run = open_run(table, "r", "mine")
    assert await _refused(table, "r", "yours") is ErrorCode.LEASE_MISMATCH
    async with table.opened("r", "yours", takeover=True) as taken:
        assert taken is run
    assert run.lease == "mine", "a takeover that does not flip takes nothing"
    async with table.opened("r", "yours", takeover=True) as taken:
        table.own(taken, "yours")
    assert await _refused(table, "r", "mine") is ErrorCode.LEASE_MISMATCH


async def test_a_run_keeps_its_place_until_the_next_one_is_served() -> None:
    table = RunTable(2, 1)
    run = open_run(table)
    active = await _install(table, run, 0)
    assert await _refused(table, "other", "x") is ErrorCode.NO_FREE_RUN
    async with table.opened("other", "x", takeover=True) as other:
        slot = await other.reserve(time.monotonic() + 1)
        assert slot is not active
        other.give_back(slot)
        assert table.runs == {"r": run}
    assert table.get("r").active is active
    async with table.opened("other", "x", takeover=True) as other:
        table.own(other, "x")
        await _install(table, other, 0)
    assert table.runs == {"other": other}
    assert run.closed
    assert [slot.state for slot in other.slots].count(SlotState.ACTIVE) == 1


async def test_a_first_push_that_fails_gives_way_to_the_next_that_waits() -> None:
    table = RunTable(2, 1)
    order: list[str] = []

    async def push(run_id: str, lease: str, *, flips: bool) -> None:
        async with table.opened(run_id, lease, takeover=False) as run:
            order.append(f"{run_id} of {lease}")
            await asyncio.sleep(0.01)
            if flips:
                table.own(run, lease)

    pushes = [
        push("a", "first", flips=False),
        push("a", "second", flips=False),
        push("b", "third", flips=True),
        push("a", "fourth", flips=True),
        push("b", "fifth", flips=True),
    ]
    outcomes = await asyncio.gather(*pushes, return_exceptions=True)
    assert order == ["a of first", "a of second", "b of third"]
    assert [getattr(outcome, "code", None) for outcome in outcomes] == [
        None,
        None,
        None,
        ErrorCode.NO_FREE_RUN,
        ErrorCode.LEASE_MISMATCH,
    ]
    assert list(table.runs) == ["b"]


async def test_new_runs_are_opened_side_by_side_where_there_is_room() -> None:
    table = RunTable(2, 2)
    async with (
        table.opened("a", "x", takeover=False) as one,
        table.opened("b", "y", takeover=False) as two,
    ):
        assert one.ring is not two.ring
        third = asyncio.ensure_future(_refused(table, "c", "z"))
        await asyncio.sleep(0.01)
        assert not third.done(), "both may fail yet"
        table.own(one, "x")
        table.own(two, "y")
    assert await third is ErrorCode.NO_FREE_RUN


async def test_a_new_run_waits_for_the_old_ones_requests() -> None:
    table = RunTable(1, 1)
    old = open_run(table, "old")
    slot = await _install(table, old, 0)
    old.acquire(slot, "request")
    table.close("old")
    new = open_run(table, "new")
    waiting = asyncio.ensure_future(new.reserve(time.monotonic() + 5))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    old.release(slot, "request")
    assert await waiting is slot


async def test_runs_have_slots_of_their_own() -> None:
    table = RunTable(2, 3)
    rings = [open_run(table, name).slots for name in "abc"]
    assert sorted(slot.slot_id for ring in rings for slot in ring) == [1, 2, 3, 4, 5, 6]


async def test_waiting_for_a_step() -> None:
    table = RunTable(2, 1)
    run = open_run(table, "r")
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


@pytest.mark.parametrize(
    ("runs", "asked", "words"),
    [
        ([], None, "has no run yet: push an adapter first"),
        ([], "r", "has no run yet"),
        (["a", "b"], None, r"several runs are served: name one with run_id \(a, b\)"),
        (["a", "b"], "c", r"there is no run 'c': name one with run_id \(a, b\)"),
    ],
)
async def test_a_run_that_is_not_there(runs, asked, words) -> None:
    table = RunTable(slots_per_run=2, max_runs=2)
    for name in runs:
        open_run(table, name)
    with pytest.raises(LockstepError, match=words) as refusal:
        table.get(asked)
    assert refusal.value.code is ErrorCode.UNKNOWN_RUN


async def _trained(table: RunTable, run_id: str, *, keep_s: float | None = 0.0) -> Run:
    """A run that serves its step 0, and has finished unless `keep_s` is None."""
    async with table.opened(run_id, run_id, takeover=False) as run:
        slot = await run.reserve(time.monotonic() + 1)
        table.own(run, run_id)
        version = WeightVersion(run_id=run_id, step=0)
        run.flip(slot, version, table.next_install_seq(), "sum")
    if keep_s is not None:
        table.finish(run_id, run_id, version, keep_s)
    return run


async def test_a_finished_run_is_served_until_its_place_is_needed() -> None:
    table = RunTable(2, 1)
    old = await _trained(table, "old")
    assert table.get("old").active is not None
    assert table.get(None) is old
    async with table.opened("new", "new", takeover=False) as new:
        assert table.get(None) is old, "a push that is under way may fail yet"
    assert list(table.runs) == ["old"]
    new = await _trained(table, "new", keep_s=None)
    assert table.runs == {"new": new}
    assert old.closed
    with pytest.raises(LockstepError, match="there is no run 'old'") as refusal:
        table.get("old")
    assert refusal.value.code is ErrorCode.UNKNOWN_RUN


async def test_a_run_that_has_not_finished_keeps_its_place() -> None:
    """Its learner may have been killed, and come back."""
    table = RunTable(2, 1)
    await _trained(table, "r", keep_s=None)
    assert await _refused(table, "other", "x") is ErrorCode.NO_FREE_RUN


async def test_a_finished_run_keeps_its_place_for_as_long_as_it_says() -> None:
    table = RunTable(2, 1)
    run = await _trained(table, "kept", keep_s=3600.0)
    with pytest.raises(LockstepError, match=r"kept \(finished; kept for 3[56]\d\d s more\)"):
        table.places("other", "x", takeover=False)
    with pytest.raises(LockstepError):
        table.check_end(run, "a stranger's", takeover=False)
    table.check_end(run, "a stranger's", takeover=True)
    table.finish("kept", "kept", _version_of(run), 0.0)
    assert table.places("other", "x", takeover=False) == [run.ring]
    table.check_end(run, "a stranger's", takeover=False)


async def test_free_places_go_first_then_those_of_the_longest_finished() -> None:
    table = RunTable(2, 3)
    first, second = await _trained(table, "first", keep_s=None), await _trained(table, "second")
    third = await _trained(table, "third", keep_s=None)
    table.finish("first", "first", _version_of(first), 0.0)
    assert table.places("new", "x", takeover=False) == [second.ring, first.ring]
    table.close("third")
    assert table.places("new", "x", takeover=False) == [third.ring, second.ring, first.ring]
    await _trained(table, "new", keep_s=None)
    await _trained(table, "newer", keep_s=None)
    assert set(table.runs) == {"first", "new", "newer"}


async def test_a_finished_run_that_is_pushed_to_again_trains_again() -> None:
    table = RunTable(2, 1)
    run = await _trained(table, "r")
    async with table.opened("r", "r", takeover=False) as again:
        assert again is run
        waiting = asyncio.ensure_future(_refused(table, "other", "x"))
        await asyncio.sleep(0)
        table.own(again, "r")
        await _install(table, again, 1)
    assert await waiting is ErrorCode.NO_FREE_RUN, "it came second"
    with pytest.raises(LockstepError) as late:
        table.finish("r", "r", _version(0), 0.0)
    assert late.value.code is ErrorCode.VERSION_NOT_ACTIVE, "a late word of its first training ends nothing"
    assert run.finished is None
    with pytest.raises(LockstepError) as stranger:
        table.finish("r", "x", _version(1), 0.0)
    assert stranger.value.code is ErrorCode.LEASE_MISMATCH


async def test_without_a_name_the_run_in_training_is_meant() -> None:
    table = RunTable(2, 3)
    await _trained(table, "done")
    training = await _trained(table, "training", keep_s=None)
    assert table.get(None) is training
    await _trained(table, "too", keep_s=None)
    with pytest.raises(LockstepError, match=r"several runs are served: name one with run_id \(done, too, training\)"):
        table.get(None)


async def test_without_a_name_and_a_training_the_run_that_finished_last_is_meant() -> None:
    table = RunTable(2, 2)
    first, second = await _trained(table, "first", keep_s=None), await _trained(table, "second")
    assert table.get(None) is first
    table.finish("first", "first", _version_of(first), 0.0)
    assert table.get(None) is first
    table.finish("second", "second", _version_of(second), 0.0)
    assert table.get(None) is second


def _version_of(run: Run) -> WeightVersion:
    assert run.active
    assert run.active.version
    return run.active.version
