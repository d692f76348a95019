"""Several blocking calls at once, on threads that nobody has to wait for when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def start(call: Callable[[], T], name: str) -> Future[T]:
    """Run `call` on a daemon thread: unlike an executor's, it is not joined at exit."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome


def all_of(calls: Sequence[Callable[[], T]], name: str, at_once: int) -> list[T]:
    """The results of all calls, in order; the first error among them."""
    if len(calls) == 1:
        return [calls[0]()]
    places = threading.BoundedSemaphore(at_once)

    def in_place(call: Callable[[], T]) -> T:
        with places:
            return call()

    started = [start(partial(in_place, call), f"{name}-{i}") for i, call in enumerate(calls)]
    return [outcome.result() for outcome in started]
