"""A pool of actors that call functions, each call within a time limit.

An actor that exceeds the limit is killed, and one that dies, alone or with its node, is replaced, on another node if
need be. All of them end with this process, by whatever it ends: they belong to its job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, NamedTuple

from learner.cluster.connection import last_line
from learner.cluster.resources import Resources, describe, others
from learner.utils.threads import start
from shared.errors import NotReady

logger = logging.getLogger("lockstep.cluster")

#: For a call to reach its actor, and its result to come back, beyond the call's own limit.
_WAY_S = 1.0
#: For an idle actor to show that it lives, before it is given a call.
_SIGN_OF_LIFE_S = 15.0
_LOOK_S, _RETRY_S, _SAY_S = 1.0, 2.0, 60.0


class WorkerDied(Exception):
    """The actor of a call ended before the call did."""


class WorkerActor:
    """Calls functions, one at a time; an actor.

    Args:
        setup: folders to import from beside its own, where the node has them; a function to call before any other, and
            its arguments.
    """

    def __init__(self, setup: tuple[Sequence[str], Callable[..., object], tuple[Any, ...]]) -> None:
        folders, prepare, args = setup
        sys.path += [folder for folder in folders if folder not in sys.path and os.path.isdir(folder)]
        prepare(*args)

    def live(self) -> None:
        """Answer."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function` returns."""
        return function(*args)


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    timeout_s: float | None
    outcome: Future[Any]


class WorkerPool:
    """Calls functions on the nodes of a cluster; safe to use from several threads.

    Args:
        ray: connected.
        count: of actors; the pool works with those that the cluster has room for.
        needs: resources of each.
        prepare, args: called in each actor before it takes calls.
    """

    def __init__(
        self, ray: Any, count: int, needs: Resources, prepare: Callable[..., object], args: tuple[Any, ...] = ()
    ) -> None:
        self._ray, self._count, self._needs = ray, count, dict(needs)
        folders = [os.path.abspath(folder) for folder in sys.path]
        self._setup = ray.put((folders, prepare, args))  # once, however often an actor is started again
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._actors: dict[int, Any] = {}
        self._serving: set[int] = set()
        #: Those whose last start failed.
        self._failing: set[int] = set()
        self._problem, self._is_said = "", False
        self._lock, self._closed = threading.Lock(), threading.Event()
        for number in range(count):
            start(partial(self._work, number), f"cluster-worker-{number}")

    @property
    def active(self) -> bool:
        """Whether an actor serves, or may yet start."""
        return len(self._failing) < self._count

    def schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
        """Begin to call `function` as soon as an actor is free. It and its arguments are sent by cloudpickle.

        The outcome is what it returns or raises; `TimeoutError` after `timeout_s` seconds of the call, or `WorkerDied`.
        """
        outcome: Future[Any] = Future()
        self._calls.put(_Call(function, args, timeout_s, outcome))
        return outcome

    def describe(self) -> str:
        """Return in words how it stands."""
        why = f"; the last problem: {self._problem}" if self._problem else ""
        return f"{len(self._serving)} of {self._count} run on the Ray cluster, on {self._each()} each{why}"

    def close(self) -> None:
        """End all actors, whatever they are doing. Calls that have not ended have no outcome."""
        self._closed.set()
        for number in range(self._count):
            self._calls.put(None)
            self._end(number)

    def _work(self, number: int) -> None:
        """Keep one actor running, and give it calls."""
        while not self._closed.is_set():
            try:
                actor = self._start(number)
            except Exception as error:  # of Ray, or of what the actor imports, of any kind
                self._problem = last_line(error)
                self._failing.add(number)
                self._end(number)
                self._closed.wait(_RETRY_S)
                continue
            if actor is not None:
                self._failing.discard(number)
                self._serving.add(number)
                self._serve(number, actor)
                self._serving.discard(number)
            self._end(number)

    def _start(self, number: int) -> Any:
        """Start an actor, and return it once it is ready; None if the pool was closed."""
        if not self._ray.is_initialized():  # Ray would begin a cluster of its own
            raise NotReady("the connection to the Ray cluster has ended")
        needs = dict(self._needs)
        kind = self._ray.remote(WorkerActor).options(
            num_cpus=needs.pop("CPU", 0),
            num_gpus=needs.pop("GPU", 0),
            memory=needs.pop("memory", None),
            resources=needs or None,
            max_restarts=0,
            max_concurrency=1,
            scheduling_strategy="SPREAD",
        )
        with self._lock:
            if self._closed.is_set():
                return None
            actor = self._actors[number] = kind.remote(self._setup)
        sign, said_at = actor.live.remote(), time.monotonic() + _SAY_S
        while not self._closed.is_set():
            try:
                self._ray.get(sign, timeout=_LOOK_S)
                return actor
            except self._ray.exceptions.GetTimeoutError:
                if time.monotonic() > said_at and not self._is_said:
                    self._is_said = True
                    logger.warning("workers wait for room: %s (said once)", self.describe())
        return None

    def _serve(self, number: int, actor: Any) -> None:
        """Give an actor calls until it is lost, or the pool closed."""
        errors = self._ray.exceptions
        while (call := self._calls.get()) is not None and not self._closed.is_set():
            try:
                self._ray.get(actor.live.remote(), timeout=_SIGN_OF_LIFE_S)
            except Exception:  # it was lost while it was idle: that is not the call's fault
                self._calls.put(call)
                return
            try:
                limit_s = None if call.timeout_s is None else call.timeout_s + _WAY_S
                result = self._ray.get(actor.call.remote(call.function, *call.args), timeout=limit_s)
            except errors.RayTaskError as error:  # raised by the function
                _settle(call, error)
            except Exception as error:  # of Ray, of any kind: the actor is gone, or is given up
                self._end(number)
                if self._closed.is_set():
                    return
                late = isinstance(error, errors.GetTimeoutError)
                _settle(call, TimeoutError(f"more than {call.timeout_s} s") if late else WorkerDied(last_line(error)))
                return
            else:
                with contextlib.suppress(InvalidStateError):  # given up meanwhile
                    call.outcome.set_result(result)

    def _end(self, number: int) -> None:
        with self._lock:
            actor = self._actors.pop(number, None)
        if actor is not None and self._ray.is_initialized():
            with contextlib.suppress(Exception):  # it may be gone, or the cluster
                self._ray.kill(actor)

    def _each(self) -> str:
        return describe(self._needs, *others(self._needs))


def _settle(call: _Call, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        call.outcome.set_exception(error)
