"""Waiting for a condition, and for a load that is long enough on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import pytest

T = TypeVar("T")


class EndedEarlyError(Exception):
    """The running requests were done before the push they had to outlive."""


def until(condition: Callable[[], object], timeout_s: float = 60.0, running: Future | None = None) -> None:
    """Return as soon as `condition()` holds. `running`: what it depends on, whose error is raised."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if running is not None and running.done():
            running.result()
            raise EndedEarlyError
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def with_enough_load(scenario: Callable[[int], T], loads: Sequence[int] = (8, 16, 32, 64, 128)) -> T:
    """What `scenario(n)` returns, with n completions per prompt: more as often as requests end before their push.

    How long a tiny model decodes depends on the machine by a factor of twenty; the largest n is far above all of that.
    """
    for n in loads:
        try:
            return scenario(n)
        except EndedEarlyError:
            continue
    pytest.fail("no load outlived a push: the push waited for the running requests")


def outlives(condition: object) -> None:
    """To be called with what holds while the requests of a scenario run."""
    if not condition:
        raise EndedEarlyError
