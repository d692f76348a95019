"""Wait for a condition; repeat a scenario until its load outlasts a push on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import pytest

T = TypeVar("T")


class EndedEarlyError(Exception):
    """The running requests ended before the push that they had to outlast."""


def until(condition: Callable[[], object], timeout_s: float = 60.0, running: Future | None = None) -> None:
    """Return as soon as `condition()` holds.

    Args:
        running: work that the condition depends on; its error is raised.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if running is not None and running.done():
            running.result()
            raise EndedEarlyError
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


class Load(NamedTuple):
    """How much is generated: `n` completions of `tokens` tokens for each prompt."""

    n: int
    tokens: int


LOADS = (Load(8, 300), *(Load(n, 900) for n in (8, 16, 32, 64, 128)))


def with_enough_load(scenario: Callable[[Load], T], loads: Sequence[Load] = LOADS) -> T:
    """Return what `scenario` does for the first load that does not end before the push.

    The decoding time of a tiny model varies by a factor of twenty between machines; the largest is enough for all.
    """
    for load in loads:
        try:
            return scenario(load)
        except EndedEarlyError:
            continue
    pytest.fail("no load outlasted a push: the push waited for the running requests")


def outlives(condition: object) -> None:
    """Raise `EndedEarlyError` unless a condition holds that is true while the requests of a scenario run."""
    if not condition:
        raise EndedEarlyError
