"""Reward functions that cannot leave the learner's process: on threads, which nothing can kill."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from learner.rewards.calls import RewardResult
from learner.rewards.worker import call
from learner.utils.threads import start
from shared.errors import LockstepError, Timeout

if TYPE_CHECKING:
    from learner.rewards.calls import Parts, RewardCall

MAX_STUCK = 3


class FunctionThread:
    """Calls one function, one group after the other. Calls that take too long are left behind.

    Args:
        timeout_s: limit per row.
    """

    def __init__(self, name: str, function: Callable[..., Any], timeout_s: float) -> None:
        self._name, self._function, self._timeout_s = name, function, timeout_s
        self._waiting: queue.SimpleQueue[tuple[RewardCall, Future[Parts]]] = queue.SimpleQueue()
        self._stuck: list[Future[RewardResult]] = []
        start(self._work, f"reward-{name}")

    def submit(self, call: RewardCall) -> Future[Parts]:
        """Begin to score a group, when those before it are done."""
        outcome: Future[Parts] = Future()
        self._waiting.put((call, outcome))
        return outcome

    def _work(self) -> None:
        while True:
            asked, outcome = self._waiting.get()
            try:
                outcome.set_result([(len(asked), self._answer(asked))])
            except LockstepError as error:
                outcome.set_exception(error)

    def _answer(self, asked: RewardCall) -> RewardResult | None:
        if len(self._alive()) >= MAX_STUCK:
            raise Timeout(
                f"the reward {self._name} is stuck on {MAX_STUCK} threads, which cannot be stopped: give it a "
                "time limit of its own, or make it importable so that it runs in a reward worker"
            )
        running = start(partial(call, self._function, asked.kwargs), f"reward-{self._name}")
        try:
            return running.result(self._timeout_s * len(asked))
        except TimeoutError:
            self._stuck.append(running)
            return None

    def _alive(self) -> list[Future[RewardResult]]:
        """Calls that were left behind and have not come back."""
        self._stuck = [running for running in self._stuck if not running.done()]
        return self._stuck
