"""Blocking calls on daemon threads, which a process need not wait for when it exits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, as_completed, wait
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


def all_of(calls: Sequence[Callable[[], T]], name: str) -> list[T]:
    """Run all calls at once. Return their results in order, or raise the first error in order once all have ended."""
    if len(calls) == 1:
        return [calls[0]()]
    started = [start(call, f"{name}-{i}") for i, call in enumerate(calls)]
    wait(started)
    return [outcome.result() for outcome in started]


def one_after_the_other(calls: Sequence[Callable[[], object]]) -> None:
    """Make all calls; raise the first error once all have been made."""
    errors = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def side_by_side(calls: Sequence[Callable[[], T]], limit: int, name: str) -> list[T]:
    """Run calls on up to `limit` threads; return their results in order.

    Raises the first error at once: no further call is begun, and those under way are not waited for.
    """
    waiting, results, stopped = deque(enumerate(calls)), dict[int, T](), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                number, call = waiting.popleft()
            except IndexError:
                return
            results[number] = call()

    done, _ = wait([start(work, f"{name}-{i}") for i in range(min(len(calls), limit))], return_when=FIRST_EXCEPTION)
    stopped.set()
    for outcome in done:
        outcome.result()
    return [results[number] for number in range(len(calls))]


def first_of(outcomes: Collection[Future[T]], grace_s: float) -> list[Future[T]]:
    """Wait for the first success and `grace_s` seconds longer; return all that have succeeded by then.

    Raises the last error if all fail.
    """
    for outcome in as_completed(outcomes):
        if outcome.exception() is None:
            break
    else:
        outcome.result()
    wait(outcomes, grace_s)
    return [outcome for outcome in outcomes if outcome.done() and outcome.exception() is None]
