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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from learner.cluster.connection import connect, last_line
from learner.cluster.resources import Resources, check_fits, describe, nodes, others
from learner.utils.threads import start
from learner.utils.waits import LATER_S, waiting
from shared.errors import InvalidRequest, NotReady

logger = logging.getLogger("lockstep.cluster")

#: For a call to reach its actor, and its result to come back, beyond the call's own limit.
_WAY_S = 1.0
#: For an idle actor to show that it lives, before it is given a call.
_SIGN_OF_LIFE_S = 15.0
_LOOK_S, _RETRY_S, _SAY_S = 1.0, 2.0, 60.0
#: An actor whose starts failed this often in a row is given up: with a node that dies, one start may fail, or two.
_STARTS = 3
#: How long a reservation waits while no actor runs at all.
_NONE_RUNS_S = 300.0
#: Resources of Ray's that an actor cannot ask for by name.
_RESERVED = {"object_store_memory", "bundle"}


class WorkerDied(Exception):
    """The actor of a call ended before the call did."""


class WorkerActor:
    """Calls functions, one at a time; an actor.

    Args:
        setup: folders to import from beside its own, where the node has them; whether it sees the GPUs that Ray gives
            it; a function to call before any other, and its arguments.
    """

    def __init__(self, setup: tuple[Sequence[str], bool, Callable[..., object], tuple[Any, ...]]) -> None:
        folders, sees_gpus, prepare, args = setup
        if not sees_gpus:  # Ray would show all of the node's
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
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


@dataclass(eq=False)
class _Place:
    """What an actor is to be free for.

    Attributes:
        free: has a result once an actor is.
        call: what the actor is to do then; None: nothing.
    """

    free: Future[None] = field(default_factory=Future)
    call: Future[_Call | None] = field(default_factory=Future)


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
        # Once, however often an actor is started again.
        self._setup = ray.put((folders, bool(needs.get("GPU")), prepare, args))
        self._places: queue.SimpleQueue[_Place | None] = queue.SimpleQueue()
        self._actors: dict[int, Any] = {}
        self._serving: set[int] = set()
        #: Starts of each that failed in a row.
        self._failed: dict[int, int] = {}
        self._problem, self._is_said = "", False
        self._lock, self._closed = threading.Lock(), threading.Event()
        #: Of all that wait for an actor, the one that says so.
        self._saying = threading.Lock()
        for number in range(count):
            start(partial(self._work, number), f"cluster-worker-{number}")

    @property
    def active(self) -> bool:
        """Whether an actor serves, or may yet start."""
        return sum(failed >= _STARTS for failed in list(self._failed.values())) < self._count

    def schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
        """Begin to call `function` as soon as an actor is free. It and its arguments are sent by cloudpickle.

        The outcome is what it returns or raises; `TimeoutError` after `timeout_s` seconds of the call, or `WorkerDied`.
        """
        place = _Place()
        outcome = _give(place, function, args, timeout_s)
        self._places.put(place)
        return outcome

    @contextlib.contextmanager
    def reserve(self, what: str) -> Iterator[Callable[..., Any]]:
        """Wait for an idle actor, which is kept for one call, or until the block ends.

        Yields:
            `call(function, args, timeout_s)`, which makes that call, and returns or raises its outcome, see `schedule`;
            `NotReady` once the pool is closed.

        Args:
            what: it is for, in words.

        Raises:
            InvalidRequest: no actor can be started.
            NotReady: none has run for minutes, or the pool was closed.
        """
        place = _Place()
        self._places.put(place)
        try:
            with self._waiting(what):
                self._wait_until_free(place, what)
            yield partial(self._call_there, place)
        finally:
            with contextlib.suppress(InvalidStateError):  # a call was made
                place.call.set_result(None)

    def describe(self) -> str:
        """Return in words how it stands."""
        why = f"; the last problem: {self._problem}" if self._problem else ""
        return f"{len(self._serving)} of {self._count} run on the Ray cluster, on {self._each()} each{why}"

    def close(self) -> None:
        """End all actors, whatever they are doing. Calls that have not ended have no outcome."""
        self._closed.set()
        for number in range(self._count):
            self._places.put(None)
            self._end(number)

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        if not self._saying.acquire(blocking=False):
            yield
            return
        try:
            with waiting(f"room for {what} on the Ray cluster", detail=self.describe, mentions_s=LATER_S):
                yield
        finally:
            self._saying.release()

    def _wait_until_free(self, place: _Place, what: str) -> None:
        ran_at = time.monotonic()
        while not wait([place.free], _LOOK_S).done:
            self._check_open()
            if not self._ray.is_initialized():
                raise NotReady("the connection to the Ray cluster has ended")
            if not self.active:
                raise InvalidRequest(f"no actor can be started for {what}: {self.describe()}")
            if self._serving:
                ran_at = time.monotonic()
            elif time.monotonic() > ran_at + _NONE_RUNS_S:
                raise NotReady(f"there was no room for {what} for {_NONE_RUNS_S:g} s: {self.describe()}")

    def _call_there(
        self, place: _Place, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None
    ) -> Any:
        outcome = _give(place, function, args, timeout_s)
        while not wait([outcome], _LOOK_S).done:
            self._check_open()
        return outcome.result()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise NotReady("the workers on the Ray cluster were ended")

    def _work(self, number: int) -> None:
        """Keep one actor running, and give it calls."""
        while not self._closed.is_set():
            try:
                actor = self._start(number)
            except Exception as error:  # of Ray, or of what the actor imports, of any kind
                self._problem = last_line(error)
                self._failed[number] = self._failed.get(number, 0) + 1
                self._end(number)
                self._closed.wait(_RETRY_S)
                continue
            if actor is not None:
                self._failed[number] = 0
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
        while (place := self._places.get()) is not None and not self._closed.is_set():
            try:
                self._ray.get(actor.live.remote(), timeout=_SIGN_OF_LIFE_S)
            except Exception:  # it was lost while it was idle: that is not the call's fault
                self._places.put(place)
                return
            place.free.set_result(None)
            call = place.call.result()
            if call is not None and not self._make(call, number, actor):
                return

    def _make(self, call: _Call, number: int, actor: Any) -> bool:
        """Make a call; return whether its actor can take another."""
        errors = self._ray.exceptions
        try:
            limit_s = None if call.timeout_s is None else call.timeout_s + _WAY_S
            result = self._ray.get(actor.call.remote(call.function, *call.args), timeout=limit_s)
        except errors.RayTaskError as error:  # raised by the function
            _settle(call, error)
        except Exception as error:  # of Ray, of any kind: the actor is gone, or is given up
            self._end(number)
            if not self._closed.is_set():
                late = isinstance(error, errors.GetTimeoutError)
                _settle(call, TimeoutError(f"more than {call.timeout_s} s") if late else WorkerDied(last_line(error)))
            return False
        else:
            with contextlib.suppress(InvalidStateError):  # given up meanwhile
                call.outcome.set_result(result)
        return True

    def _end(self, number: int) -> None:
        with self._lock:
            actor = self._actors.pop(number, None)
        if actor is not None and self._ray.is_initialized():
            with contextlib.suppress(Exception):  # it may be gone, or the cluster
                self._ray.kill(actor)

    def _each(self) -> str:
        return describe(self._needs, *others(self._needs))


def _give(place: _Place, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Future[Any]:
    outcome: Future[Any] = Future()
    place.call.set_result(_Call(function, args, timeout_s, outcome))
    return outcome


def _settle(call: _Call, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        call.outcome.set_exception(error)


def pools_on_cluster(kind: str, needs: Resources, what: str) -> Callable[..., WorkerPool]:
    """Return what starts pools on the cluster of $RAY_ADDRESS, or the one that this machine is a node of.

    Returns:
        a function of the other arguments of `WorkerPool`: count, prepare, args.

    Args:
        kind: `reward` for the options `reward_backend` and `reward_resources`.
        needs: resources of each actor, in Ray's names.
        what: is run there, in words.

    Raises:
        InvalidRequest: no Ray, no cluster, or no node of it has these resources.
    """
    if refused := sorted(_RESERVED.intersection(needs)):
        raise InvalidRequest(f"{kind}_resources: {refused[0]} is Ray's own and nobody's to ask for; leave it out")
    try:
        ray = connect()
        check_fits(nodes(ray), needs, what)
    except InvalidRequest as error:
        raise InvalidRequest(f"{kind}_backend ray: {error.message}") from error
    return lambda count, prepare, args: WorkerPool(ray, count, needs, prepare, args)
