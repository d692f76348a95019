"""The chaos suite puts off faults that cannot be injected, fails if they never can, and checks what servers say."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos import __main__ as chaos
from tests.chaos import agreement
from tests.chaos.faults import BROADCAST_FAULTS, FAULTS, Fault, plan
from tests.chaos.report import Record, table
from tests.chaos.world import NotInjectedError


class _World(SimpleNamespace):
    """A training whose steps go on, with one server."""

    def __init__(self, receipts: Callable[[], list[dict[str, Any]]] = list) -> None:
        violations: list[str] = []

        def require(invariant: str, holds: bool, what: str) -> None:
            if not holds:
                violations.append(f"{invariant}: {what}")

        super().__init__(
            options=SimpleNamespace(steps=0, servers=1, seed=1, broadcast=False),
            checker=SimpleNamespace(
                violations=violations, checks={}, largest_gap=0.0, largest_share=0.0, require=require
            ),
            learner=SimpleNamespace(done=SimpleNamespace(is_set=lambda: False), generation=1, exits=[]),
            control=SimpleNamespace(receipts=receipts),
            during="",
            step=lambda: 1,
            addresses=lambda: ["http://server-0"],
            hurry=lambda: None,
            progress=lambda since, within: 0.1,
        )


def _now() -> list[dict[str, Any]]:
    return [{"server": 0, "step": 3, "time": time.monotonic()}]


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses of /health and /ready."""
    statuses = [200, 200]
    monkeypatch.setattr(agreement, "says", lambda url: tuple(statuses))
    return statuses


def _fault(recipe: Callable[..., None]) -> Fault:
    return Fault("a fault", recipe, 1, limit_s=0.3)


def test_what_cannot_be_injected_is_put_off(ready: list[int]) -> None:
    tried: list[str] = []

    def not_at_first(*_: Any) -> None:
        tried.append("first")
        if len(tried) < 3:
            raise NotInjectedError("not now")

    world = _World(_now)
    records = chaos.disturb(world, [_fault(not_at_first), _fault(lambda *_: tried.append("second"))], Random(1))  # type: ignore[arg-type]
    assert tried == ["first", "second", "first"]
    assert [record.injected for record in records] == [True, True]


def test_what_never_can_fails_the_run(ready: list[int]) -> None:
    def never(*_: Any) -> None:
        raise NotInjectedError("never")

    world = _World(_now)
    records = chaos.disturb(world, [_fault(never), _fault(lambda *_: None)], Random(1))  # type: ignore[arg-type]
    assert sorted(record.injected for record in records) == [False, True]
    text, passed = table(records, world, 1.0)  # type: ignore[arg-type]
    assert not passed
    assert "not injected 1 times, a fault: NotInjectedError: never" in text


def test_a_run_with_all_faults_passes() -> None:
    assert table([Record("a fault", 0, True, recovery=0.1)], _World(), 1.0)[1]  # type: ignore[arg-type]


def test_a_server_that_is_ready_and_takes_no_push(ready: list[int]) -> None:
    world = _World(lambda: [{"server": 0, "step": 3, "time": 0.0}])
    agreement.check(world, 0.3)  # type: ignore[arg-type]
    assert len(world.checker.violations) == 1
    assert "says that it is ready, and has taken no push" in world.checker.violations[0]


def test_a_server_that_takes_pushes(ready: list[int]) -> None:
    world = _World(_now)
    agreement.check(world, 0.3)  # type: ignore[arg-type]
    assert world.checker.violations == []


@pytest.mark.parametrize("index", [0, 1])
def test_a_server_that_says_that_it_is_not_well(ready: list[int], index: int) -> None:
    ready[index] = 503
    world = _World()
    agreement.check(world, 0.3)  # type: ignore[arg-type]
    assert world.checker.violations == []


def test_every_fault_is_in_a_schedule_and_in_the_short_one() -> None:
    chosen = plan(Random(2), 210, quick=False, missing=set())
    assert len(chosen) == 210
    assert {fault.name for fault in chosen} == {fault.name for fault in FAULTS}
    quick = {fault.name for fault in plan(Random(2), 10**6, quick=True, missing=set())}
    assert {"push: refused takeover", "push: long names", "strangers: idle connections"} <= quick


def test_few_of_forty_faults_of_a_training_that_broadcasts_end_the_server() -> None:
    chosen = plan(Random(2), 40, quick=False, missing=set(), faults=BROADCAST_FAULTS)
    assert len(chosen) == 40
    assert {fault.name for fault in chosen} == {fault.name for fault in BROADCAST_FAULTS}
    ends = ("server: kill", "engine: kill", "engine's worker: kill", "no memory", "failed assertion")
    assert sum(any(word in fault.name for word in ends) for fault in chosen) == 5
    assert sum("inside a push" in fault.name for fault in chosen) >= 20


def test_nothing_is_injected_when_the_time_is_up(ready: list[int]) -> None:
    world, ended = _World(_now), list[int]()
    world.end_early = lambda: ended.append(1)
    faults = [_fault(lambda *_: time.sleep(0.3)) for _ in range(5)]
    records = chaos.disturb(world, faults, Random(1), time.monotonic() + 0.2)  # type: ignore[arg-type]
    assert 0 < len(records) < 5
    assert ended == [1]


def test_a_schedule_of_some_faults_has_as_many_as_are_asked_for() -> None:
    chosen = plan(Random(2), 8, quick=False, missing=set(), only="session: its")
    assert len(chosen) == 8
    assert {fault.name for fault in chosen} == {fault.name for fault in FAULTS if "session: its" in fault.name}


def test_long_names_are_in_the_blob(tmp_path: Path) -> None:
    from tests.chaos.forgery import other_run, renamed
    from tests.fuzz.blobs import take_apart
    from tests.unit.chaos.test_proxy import BLOB

    document, manifest, data = take_apart(renamed(BLOB, 70_000))
    assert max(map(len, manifest["modules"])) == 70_000
    assert max(map(len, document)) > 70_000
    assert data == take_apart(BLOB)[2]
    assert take_apart(other_run(BLOB, "other"))[1]["version"]["run_id"] == "other"
