"""Reward functions in worker processes, with a time limit that holds: what hangs is killed, what dies is replaced."""

from __future__ import annotations

import atexit
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import cloudpickle
from loky.backend.context import get_context
from pebble import ProcessExpired, ProcessPool

from learner.rewards import worker
from learner.rewards.calls import Parts, RewardCall, RewardResult
from learner.rewards.thread_fallback import FunctionThread
from learner.utils.threads import start
from shared.errors import InvalidRequest

#: How long workers may take to start and to import what the functions need.
START_S = 300.0
#: A function that drags more along than this (a model, say) is not sent to other processes.
MAX_BLOB_BYTES = 2**28
_MAX_RESTARTS = 8
_LOOK_S = 1.0
#: What the pool says of a call whose process was killed, died, or never came to it.
_LOST = (TimeoutError, ProcessExpired, BrokenProcessPool, CancelledError)


class RewardPool:
    """Calls reward functions for one group at a time; safe to use from several threads.

    A group that takes too long, or whose process dies, is called again row by row, so that one bad completion does not
    cost the others their rewards. Functions that cannot be sent to another process run on threads of their own.

    Args:
        functions: (name, function), numbered in this order from now on.
        workers: processes.
        timeout_s: limit per row; a group has as much for each of its rows.
        warn: told once for each function what keeps it out of the workers.
    """

    def __init__(
        self,
        functions: Sequence[tuple[str, Callable[..., Any]]],
        *,
        workers: int,
        timeout_s: float,
        warn: Callable[[str], None],
    ) -> None:
        self._functions, self._workers, self._timeout_s, self._warn = functions, workers, timeout_s, warn
        self._threads: dict[int, FunctionThread] = {}
        self._lock = threading.RLock()
        self._pool: ProcessPool | None = None
        self._closed: threading.Event | None = None
        self._outstanding: set[Future[bytes]] = set()
        self._restarts = 0
        self._blobs = [self._blob(i) for i in range(len(functions))]
        _open.add(self)
        if len(self._threads) < len(functions):
            self._probe()

    def submit(self, index: int, call: RewardCall) -> Future[Parts]:
        """Begin to score a group with function `index`."""
        if index in self._threads:
            return self._threads[index].submit(call)
        try:
            payload = call.payload
        except Exception as error:
            return self._on_a_thread(index, f"its arguments cannot be pickled ({error})").submit(call)
        outcome: Future[Parts] = Future()
        task = self._schedule(worker.score, (index, payload), self._timeout_s * len(call))

        def done(task: Future[bytes]) -> None:
            try:
                outcome.set_result([(len(call), _answer(task))])
            except _LOST as lost:
                if len(call) == 1 and isinstance(lost, TimeoutError):
                    outcome.set_result([(1, None)])
                else:
                    start(partial(self._row_by_row, index, call, outcome), "rewards-row-by-row")
            except BaseException as error:
                outcome.set_exception(error)

        task.add_done_callback(done)
        return outcome

    def wait(self, outcome: Future[Parts]) -> Parts:
        """The outcome of `submit`.

        Raises:
            LockstepError: workers die as soon as they are started.
        """
        while not wait_for([outcome], _LOOK_S).done:
            self._look_after()
        return outcome.result()

    def close(self) -> None:
        """Kill the workers, whatever they are doing. A later `submit` starts others."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._closed is not None:
            pool.stop()
            pool.join()
            self._closed.set()

    def _row_by_row(self, index: int, call: RewardCall, outcome: Future[Parts]) -> None:
        try:
            rows = [call.row(i) for i in range(len(call))]
            tasks = [self._schedule(worker.score, (index, row.payload), self._timeout_s) for row in rows]
            outcome.set_result([(1, _answer_or_none(task)) for task in tasks])
        except BaseException as error:
            outcome.set_exception(error)

    def _schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
        with self._lock:
            for last in (False, True):
                try:
                    task: Future[Any] = self._running().schedule(function, args=args, timeout=timeout_s)
                    break
                except RuntimeError:  # the pool noticed only now that it is broken
                    if last:
                        raise
                    self._look_after()
            self._outstanding.add(task)
        task.add_done_callback(self._outstanding.discard)
        return task

    def _running(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._workers,
                context=get_context("loky"),
                initializer=worker.prepare,
                initargs=(os.getpid(), self._blobs),
            )
            self._closed, started = threading.Event(), threading.Event()
            start(partial(_keep, self._pool, started, self._closed), "reward-pool")
            started.wait()
        return self._pool

    def _look_after(self) -> None:
        """Replace a pool that broke, and hand its calls back to whoever waits for them."""
        with self._lock:
            if self._pool is None or self._pool.active:
                return
            self._restarts += 1
            lost = list(self._outstanding)
            self.close()
        for task in lost:
            if not task.done():
                task.set_exception(BrokenProcessPool("the pool of reward workers broke"))
        if self._restarts > _MAX_RESTARTS:
            raise InvalidRequest(
                "reward workers die again and again: is there enough memory for them? Lower reward_workers, or set it "
                "to 0 to run rewards in the learner's process"
            )

    def _blob(self, index: int) -> bytes:
        try:
            blob = cloudpickle.dumps(self._functions[index][1])
        except Exception as error:
            self._on_a_thread(index, f"it cannot be pickled ({error})")
            return b""
        if len(blob) > MAX_BLOB_BYTES:
            self._on_a_thread(index, f"it holds {len(blob) >> 20} MiB of objects")
            return b""
        return blob

    def _probe(self) -> None:
        """Functions that a worker cannot load stay here."""
        tasks = {
            i: self._schedule(worker.load_error, (i,), None)
            for i in range(len(self._functions))
            if i not in self._threads
        }
        deadline = time.monotonic() + START_S
        for index, task in tasks.items():
            try:
                while not task.done() and time.monotonic() < deadline:
                    wait_for([task], _LOOK_S)
                    self._look_after()
                error = task.result(0)
            except _LOST as lost:
                self.close()
                raise InvalidRequest(
                    f"reward workers do not start ({type(lost).__name__}: {lost}), or a reward function's imports hang "
                    "or end the process; set reward_workers=0 to run rewards in the learner's process"
                ) from lost
            if error is not None:
                self._on_a_thread(index, f"it cannot be imported there ({error.strip().splitlines()[-1]})")

    def _on_a_thread(self, index: int, why: str) -> FunctionThread:
        with self._lock:
            if index not in self._threads:
                name, function = self._functions[index]
                self._warn(
                    f"the reward {name} runs on a thread of the learner, not in a reward worker: {why}. There it "
                    "competes with the training and cannot be stopped when it hangs; define it in a module, without "
                    "locks, sockets or models in it, or set reward_workers=0 to run all rewards as TRL does"
                )
                self._threads[index] = FunctionThread(name, function, self._timeout_s)
            return self._threads[index]


def _keep(pool: ProcessPool, started: threading.Event, closed: threading.Event) -> None:
    """Linux ends a worker with the thread that started it: this one lives as long as the pool."""
    try:
        _ = pool.active  # starts the workers
    finally:
        started.set()
    closed.wait()


def _answer(task: Future[bytes]) -> RewardResult:
    answer: RewardResult = pickle.loads(task.result())  # noqa: S301 - from a process that this one started
    return answer


def _answer_or_none(task: Future[bytes]) -> RewardResult | None:
    try:
        return _answer(task)
    except _LOST:
        return None


_open: weakref.WeakSet[RewardPool] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close every pool of this process."""
    for pool in list(_open):
        pool.close()
