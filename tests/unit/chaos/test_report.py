"""When a run of the chaos suite has passed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.report import Record, table

DONE = Record("a fault", 0, injected=True, lasted=1.0, recovery=2.0)
NOT_DONE = Record("another", 0, injected=False, note="it is not running")


def _world(violations: list[Any]) -> Any:
    checker = SimpleNamespace(violations=violations, checks={"I1": 1}, largest_gap=0.0, largest_share=0.0)
    options = SimpleNamespace(seed=1, steps=10, servers=1, broadcast=False)
    return SimpleNamespace(checker=checker, options=options, learner=SimpleNamespace(exits=[]))


@pytest.mark.parametrize(
    ("records", "passed"),
    [([DONE, DONE], True), ([DONE, NOT_DONE], False), ([NOT_DONE], False), ([], False)],
)
def test_every_fault_must_have_been_injected(records: list[Record], passed: bool) -> None:
    text, ok = table(records, _world([]), 60.0)
    assert ok is passed
    assert text.count("not injected 1 times, another: it is not running") == records.count(NOT_DONE)


def test_a_violation_fails_it() -> None:
    violation = SimpleNamespace(invariant="I1", seconds=1.0, during="a fault", what="a gap")
    assert table([DONE], _world([violation]), 60.0)[1] is False
