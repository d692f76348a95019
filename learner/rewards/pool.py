"""Reward functions in reward workers: those that exceed their time limit are killed, those that die are replaced."""

from __future__ import annotations

import atexit
import logging
import math
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Protocol, TypeVar

import cloudpickle
from loky.backend.context import get_context
from pebble import ProcessExpired, ProcessPool

from learner.cluster.workers import WorkerDied
from learner.rewards import worker
from learner.rewards.calls import Parts, RewardCall
from learner.utils.threads import start
from learner.utils.waits import LATER_S, waiting
from shared.errors import InvalidRequest

T = TypeVar("T")
logger = logging.getLogger("lockstep.rewards")

#: How long workers may take to start and to import what the functions need.
START_S = 300.0
#: Functions that hold more than this (a model, say) are not sent to other processes.
MAX_BLOB_BYTES = 2**28
_MAX_RESTARTS = 8
_LOOK_S = 1.0
#: Raised by calls whose process was killed, died, or never ran them.
_LOST = (TimeoutError, ProcessExpired, BrokenProcessPool, CancelledError, WorkerDied)


class RewardWorkers(Protocol):
    """Calls functions in processes that are not this one."""

    @property
    def active(self) -> bool:
        """Whether calls may still be made."""

    def schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
        """Begin a call; its outcome is an error of `_LOST` where its process is killed for its time, or dies."""

    def describe(self) -> str:
        """Return in words how it stands; empty: as usual."""

    def close(self) -> None:
        """Kill all processes."""


class ProcessWorkers:
    """Worker processes on this machine.

    Args:
        count: of processes.
        blobs: number -> cloudpickled reward function.
    """

    def __init__(self, count: int, blobs: Mapping[int, bytes]) -> None:
        self._pool = ProcessPool(
            max_workers=count,
            context=get_context("loky"),
            initializer=worker.prepare,
            initargs=(os.getpid(), dict(blobs)),
        )
        self._closed, started = threading.Event(), threading.Event()
        start(partial(_keep, self._pool, started, self._closed), "reward-pool")
        started.wait()

    @property
    def active(self) -> bool:
        """See `RewardWorkers`."""
        return self._pool.active

    def schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
        """See `RewardWorkers`; raises RuntimeError where the pool notices only now that it is broken."""
        return self._pool.schedule(function, args=args, timeout=timeout_s)

    def describe(self) -> str:
        """See `RewardWorkers`."""
        return ""

    def close(self) -> None:
        """See `RewardWorkers`."""
        self._pool.stop()
        self._pool.join()
        self._closed.set()


class RewardPool:
    """Calls reward functions for one group at a time; safe to use from several threads.

    A group that exceeds its time limit, or whose process dies, is called again row by row, so that one bad completion
    does not cost the others their rewards.

    Attributes:
        names: number -> name of the functions that workers can run. Those that cannot be sent to a worker are left out,
            with a warning.

    Args:
        functions: number -> (name, function).
        timeout_s: limit per row, in seconds; a group has this for each of its rows.
        make_workers: number of workers, cloudpickled functions by their number -> workers that have loaded them.

    Raises:
        LockstepError: workers do not start.
    """

    def __init__(
        self,
        functions: Mapping[int, tuple[str, Callable[..., Any]]],
        *,
        workers: int,
        timeout_s: float,
        make_workers: Callable[[int, Mapping[int, bytes]], RewardWorkers] = ProcessWorkers,
    ) -> None:
        self._workers, self.timeout_s, self._make_workers = workers, timeout_s, make_workers
        self._lock = threading.RLock()
        self._pool: RewardWorkers | None = None
        self._outstanding: set[Future[bytes]] = set()
        self._restarts = 0
        self._blobs: dict[int, bytes] = {}
        self.names = {index: name for index, (name, _) in functions.items()}
        _open.add(self)
        for index, (_, function) in functions.items():
            try:
                blob = cloudpickle.dumps(function)
                if len(blob) > MAX_BLOB_BYTES:
                    raise ValueError(f"it holds {len(blob) >> 20} MiB of objects")
                self._blobs[index] = blob
            except Exception as error:
                self._leave_out(index, f"it cannot be pickled ({error})")
        self._load()

    def submit(self, index: int, call: RewardCall) -> Future[Parts]:
        """Begin to score a group with function `index`, one of `names`."""
        outcome: Future[Parts] = Future()
        try:
            payload = call.payload
        except Exception as error:
            outcome.set_exception(
                InvalidRequest(
                    f"the arguments of the reward {self.names[index]} cannot be sent to a reward worker ({error}): "
                    "remove dataset columns that cannot be pickled, or set reward_workers=0"
                )
            )
            return outcome
        task = self._schedule(worker.score, (index, self.names[index], payload), self.timeout_s * len(call))

        def done(task: Future[bytes]) -> None:
            try:
                result = pickle.loads(task.result())  # noqa: S301 - from a process that this one started
                outcome.set_result([(len(call), result)])
            except _LOST as lost:
                if len(call) == 1 and isinstance(lost, TimeoutError):
                    outcome.set_result([(1, None)])
                else:
                    start(partial(self._score_rows, index, call, outcome), "rewards-row-by-row")
            except BaseException as error:
                outcome.set_exception(error)

        task.add_done_callback(done)
        return outcome

    def wait(self, outcome: Future[T], limit_s: float = math.inf) -> T:
        """Return the outcome of `submit`.

        Raises:
            LockstepError: workers die as soon as they are started, or the arguments cannot be pickled.
        """
        if outcome.done():
            return outcome.result(0)
        deadline = time.monotonic() + limit_s
        with waiting(f"rewards of {', '.join(self.names.values())}", detail=self._describe, mentions_s=LATER_S):
            while not wait_for([outcome], _LOOK_S).done and time.monotonic() < deadline:
                self._replace_broken()
        return outcome.result(0)

    def close(self) -> None:
        """Kill the workers, whatever they are doing. A later `submit` starts others."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _describe(self) -> str:
        pool = self._pool
        how = pool.describe() if pool else ""
        return f"each row has {self.timeout_s:g} s: --reward_timeout_s" + (f"; {how}" if how else "")

    def _score_rows(self, index: int, call: RewardCall, outcome: Future[Parts]) -> None:
        try:
            payloads = [call.part(row).payload for row in range(len(call))]
            parts: Parts = []
            arguments = [(index, self.names[index], payload) for payload in payloads]
            for task in [self._schedule(worker.score, row, self.timeout_s) for row in arguments]:
                try:
                    parts.append((1, pickle.loads(task.result())))  # noqa: S301 - as above
                except _LOST:
                    parts.append((1, None))
            outcome.set_result(parts)
        except BaseException as error:
            outcome.set_exception(error)

    def _schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
        with self._lock:
            try:
                task = self._running().schedule(function, args, timeout_s)
            except RuntimeError:  # the pool noticed only now that it is broken
                self._replace_broken()
                task = self._running().schedule(function, args, timeout_s)
            self._outstanding.add(task)
        task.add_done_callback(self._outstanding.discard)
        return task

    def _running(self) -> RewardWorkers:
        if self._pool is None:
            self._pool = self._make_workers(self._workers, dict(self._blobs))
        return self._pool

    def _replace_broken(self) -> None:
        """Close a pool that broke and fail its calls, so that those who wait for them submit them again."""
        with self._lock:
            if self._pool is None or self._pool.active:
                return
            self._restarts += 1
            lost, how = list(self._outstanding), self._pool.describe()
            self.close()
        how = f" ({how})" if how else ""
        for task in lost:
            if not task.done():
                task.set_exception(BrokenProcessPool(f"the pool of reward workers broke{how}"))
        if self._restarts > _MAX_RESTARTS:
            raise InvalidRequest(
                f"reward workers die again and again{how}: is there enough memory for them? Lower reward_workers, or "
                "set it to 0 to run rewards in the learner's process"
            )

    def _load(self) -> None:
        """Start the workers and leave out functions that they cannot load."""
        tasks = {index: self._schedule(worker.load_error, (index,), None) for index in self._blobs}
        deadline = time.monotonic() + START_S
        for index, task in tasks.items():
            try:
                error = self.wait(task, deadline - time.monotonic())
            except _LOST as lost:
                why = str(lost) or (self._pool.describe() if self._pool else "")
                self.close()
                raise InvalidRequest(
                    f"reward workers do not start ({type(lost).__name__}: {why}), or a reward function's imports hang "
                    "or end the process; set reward_workers=0 to run rewards in the learner's process"
                ) from lost
            if error is not None:
                del self._blobs[index]
                self._leave_out(index, f"it cannot be imported there ({error.strip().splitlines()[-1]})")

    def _leave_out(self, index: int, why: str) -> None:
        logger.warning(
            "the reward %s runs on the training thread and without a time limit, not in a reward worker: %s. Define it "
            "at the top level of a module that other processes can import, without locks, sockets or models in it; or "
            "set reward_workers=0 to run all rewards as TRL does",
            self.names.pop(index),
            why,
        )


def _keep(pool: ProcessPool, started: threading.Event, closed: threading.Event) -> None:
    """Live as long as the pool: Linux kills a worker when the thread that started it ends."""
    try:
        _ = pool.active  # starts the workers
    finally:
        started.set()
    closed.wait()


_open: weakref.WeakSet[RewardPool] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close every pool of this process."""
    for pool in list(_open):
        pool.close()
