"""Pool of rollout servers: discovery, health checks, recovery.

A server is *up* while it is known to serve the last push; only then is it given requests. A caller that finds otherwise
marks it as lost. One thread supervises all servers: it checks those that have been silent for a while, the longest
silent first and no more than a few at a time, and tries to recover lost ones with growing pauses, each on a thread of
its own, so that a sick server delays no other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.replica import Replica
from learner.utils.processes import allow_descriptors
from learner.utils.threads import all_of, first_of, start
from learner.utils.waits import waiting
from shared.errors import Draining, ErrorCode, InvalidRequest, LockstepError, NotReady, UnknownRun
from shared.weights import ServerState

T = TypeVar("T")
logger = logging.getLogger("lockstep.servers")

#: Errors of one server that another, or the same one later, need not have.
RECOVERABLE = {
    ErrorCode.NOT_READY,
    ErrorCode.TIMEOUT,
    ErrorCode.ENGINE_DEAD,
    ErrorCode.INSTALL_FAILED,
    ErrorCode.NO_FREE_SLOT,
    ErrorCode.CHECKSUM_MISMATCH,
    ErrorCode.OVERLOADED,
    ErrorCode.DRAINING,
    ErrorCode.INTERNAL_ERROR,
    # It has restarted, or missed a push: pushing again helps.
    ErrorCode.UNKNOWN_RUN,
    ErrorCode.VERSION_NOT_ACTIVE,
    ErrorCode.STEP_NOT_REACHED,
}
_NO_SERVER_UP = "no rollout server is up; start one, or check rollout_url"
_THEN = "the training ends: the steps so far are saved, and the same command goes on from there"
#: Another learner has the run: waiting does not help.
_FINAL = {ErrorCode.LEASE_MISMATCH, ErrorCode.STALE_VERSION}

_GRACE_S = 10.0
_WATCH_S, _WATCH_TIMEOUT_S, _MISSES = 2.0, 5.0, 3
#: How often the supervisor looks, and how many silent servers it checks then: 6 a second, whatever their number.
_LOOK_S, _CHECKS = 0.5, 3
_DISCOVER_S = 5.0


class ServerPool:
    """All rollout servers of a learner.

    Args:
        connect: returns a client of a URL.
        patience_s: seconds to wait for any server when none is up.

    Attributes:
        on_change, on_tokens: called with a server and its event, or the tokens of completions; on any thread.
        leaving: why no server is waited for any more.
    """

    def __init__(
        self, connect: Callable[[str], RolloutClient], discovery: ServerDiscovery, *, patience_s: float = 600.0
    ) -> None:
        self._connect, self._discovery, self.patience_s = connect, discovery, patience_s
        self.replicas: dict[str, Replica] = {}
        self.on_change: Callable[[Replica, str], None] = lambda replica, event: None
        self.on_tokens: Callable[[Replica, int], None] = lambda replica, count: None
        self.leaving: str | None = None
        self._changed = threading.Condition()
        #: Recovers one server. While it is set the pool is supervised; threads of an earlier one end.
        self._recover: Callable[[Replica], None] | None = None

    @classmethod
    def of(cls, client: RolloutClient, state: ServerState | None = None, *, patience_s: float = 0.0) -> ServerPool:
        """Return a pool of one server, which is up."""
        pool = cls(lambda url: client, ServerDiscovery([client.url]), patience_s=patience_s)
        pool.replicas[client.url] = Replica(client, state or client.state())
        return pool

    def wait_ready(self, timeout_s: float) -> list[Replica]:
        """Wait until a server is ready, and 10 s more for the others; mark them up and return them.

        Raises:
            NotReady: no server was found, or ready, within `timeout_s` seconds.
        """
        allow_descriptors()  # some for each server
        deadline = time.monotonic() + timeout_s
        with waiting("the address of a rollout server", limit_s=timeout_s, then="this ends"):
            while not self._discover() and not self.replicas and time.monotonic() < deadline:
                time.sleep(1.0)
        if not self.replicas:
            raise NotReady(_NO_SERVER_UP)
        asked = {start(partial(r.client.wait_ready, timeout_s), f"ready-{r.url}"): r for r in self.replicas.values()}
        for outcome in first_of(asked, grace_s=_GRACE_S):
            replica = asked[outcome]
            replica.state = outcome.result()
            self.mark_up(replica)
        return self.up()

    def supervise(self, recover: Callable[[Replica], None]) -> None:
        """Check the health of all servers from now on, and recover lost ones; follow discovery.

        Args:
            recover: brings a server up to date and calls `mark_up`; called on threads, again after each failure.
        """
        if recover == self._recover:
            return
        self._recover = recover
        _start("supervise", self._supervise, recover)
        if self._discovery.may_change:
            _start("discovery", self._follow_discovery, recover)

    def close(self) -> None:
        """Stop supervising."""
        with self._changed:
            self._recover = None
            self._changed.notify_all()

    def up(self) -> list[Replica]:
        """Return the servers that may be given requests."""
        return [replica for replica in list(self.replicas.values()) if replica.up]

    def available(self, suits: Callable[[Replica], bool] = lambda replica: True) -> list[Replica]:
        """Wait until a server that suits is up; return all that are.

        Raises:
            LockstepError: the last error of a server, after `patience_s`, or at once if none will be recovered.
        """
        deadline = time.monotonic() + self.patience_s
        said = False
        with contextlib.ExitStack() as announced, self._changed:
            while True:
                if replicas := [replica for replica in self.up() if suits(replica)]:
                    return replicas
                if self.leaving:
                    raise NotReady(f"{self.leaving} while no rollout server is up")
                failed = [(replica, replica.error) for replica in list(self.replicas.values()) if replica.error]
                final = [error for replica, error in failed if replica.incarnation and error.code in _FINAL]
                left = deadline - time.monotonic()
                if final or left <= 0 or not self._recover:
                    raise final[0] if final else failed[-1][1] if failed else NotReady(_NO_SERVER_UP)
                if not said:
                    said = True
                    announced.enter_context(
                        waiting("a rollout server", limit_s=self.patience_s, then=_THEN, detail=self._problems)
                    )
                self._changed.wait(min(left, 1.0))

    def _problems(self) -> str:
        """Return why servers are not up."""
        return "; ".join(f"{replica.url}: {replica.error}" for replica in list(self.replicas.values()) if replica.error)

    def ask_all(self, call: Callable[[Replica], T], name: str) -> list[T]:
        """Call each server that is up, concurrently; return at least one result. Servers that fail are lost.

        Raises:
            LockstepError: an error that no other server would avoid, or no result within `patience_s`.
        """

        def one(replica: Replica) -> T | None:
            incarnation = replica.incarnation
            try:
                return call(replica)
            except LockstepError as error:
                self.lost_or_raise(replica, error, incarnation)
                return None

        deadline = time.monotonic() + self.patience_s
        while True:
            replicas = self.available()
            results = all_of([partial(one, replica) for replica in replicas], name)
            if found := [result for result in results if result is not None]:
                return found
            if time.monotonic() > deadline:
                raise next((replica.error for replica in replicas if replica.error), NotReady(_NO_SERVER_UP))

    def lost_or_raise(self, replica: Replica, error: LockstepError, incarnation: int) -> None:
        """Mark a server as lost if the error is recoverable and the pool is supervised; else raise it."""
        if error.code not in RECOVERABLE or not self._recover:
            raise error
        self.lost(replica, error, incarnation)

    def lost(self, replica: Replica, error: LockstepError, incarnation: int | None = None) -> None:
        """Mark a server as lost, unless it has come up again since `incarnation`, in which it failed."""
        with self._changed:
            if not replica.up or incarnation not in (None, replica.incarnation):
                return
            replica.up, replica.error, replica.misses = False, error, 0
            replica.back_off(refused=False)
            self._changed.notify_all()
        self._report(replica, f"lost: {error}")

    def mark_up(self, replica: Replica) -> None:
        """Mark a server as serving the last push."""
        with self._changed:
            if replica.up or self.replicas.get(replica.url) is not replica:
                return
            replica.up, replica.error = True, None
            replica.heard()
            replica.incarnation += 1
            self._changed.notify_all()
        self._report(replica, "serves")

    def _report(self, replica: Replica, event: str) -> None:
        self.on_change(replica, event)
        if self._recover:  # before that, the caller of `wait_ready` reports it
            others = f" ({len(self.up())} of {len(self.replicas)} serve)" if len(self.replicas) > 1 else ""
            logger.info("%s %s%s", replica.url, event, others)

    def _supervise(self, recover: Callable[[Replica], None]) -> None:
        checks_at = 0.0
        while self._recover is recover:
            lost, silent = self._due()
            for replica in lost:
                self._attend(replica, partial(self._try_to_recover, replica, recover))
            if time.monotonic() >= checks_at:
                checks_at = time.monotonic() + _LOOK_S
                for replica in silent[:_CHECKS]:
                    self._attend(replica, partial(self._check_health, replica))
            with self._changed:
                if self._recover is recover:
                    self._changed.wait(_LOOK_S)

    def _due(self) -> tuple[list[Replica], list[Replica]]:
        """Return the lost servers that are to be tried again, and those that are to be checked, the most silent first.

        Those that a thread attends to, or pushes to, are left to it.
        """
        now = time.monotonic()
        idle = [replica for replica in list(self.replicas.values()) if not replica.attended]
        lost = [replica for replica in idle if not replica.up and now >= replica.retry_at]
        silent = [r for r in idle if r.up and not r.pushing and now >= r.heard_at + _WATCH_S]
        return lost, sorted(silent, key=lambda replica: replica.heard_at)

    def _attend(self, replica: Replica, action: Callable[[], None]) -> None:
        def attend() -> None:
            try:
                action()
            finally:
                replica.attended = False
            if not replica.up:
                with self._changed:
                    self._changed.notify_all()

        replica.attended = True
        try:
            _start(f"attend-{replica.url}", attend)
        except RuntimeError as error:  # no more threads; the next look tries again
            replica.attended = False
            logger.warning("%s is not looked after: %s", replica.url, error)

    def _check_health(self, replica: Replica) -> None:
        """Poll the state: the server may have restarted, or hang, without any request to find out."""
        receipt, incarnation = replica.receipt, replica.incarnation
        try:
            state = replica.client.state(timeout_s=_WATCH_TIMEOUT_S)
        except Exception as caught:
            error = _as_lockstep_error(caught)
            replica.misses += 1
            replica.heard_at = time.monotonic()
            if error.code is not ErrorCode.TIMEOUT or replica.misses >= _MISSES:
                self.lost(replica, error, incarnation)
            return
        replica.heard()
        if state.draining:
            self.lost(replica, Draining("it is about to leave"), incarnation)
        if not replica.pushing and replica.receipt is receipt and not replica.serves_receipt(state):
            self.lost(replica, UnknownRun("it no longer serves what it was sent"), incarnation)

    def _try_to_recover(self, replica: Replica, recover: Callable[[Replica], None]) -> None:
        try:
            recover(replica)
        except Exception as caught:  # a supervisor that dies would lose its server for good
            error = _as_lockstep_error(caught)
            refused = error.code not in RECOVERABLE
            new = replica.error is None or replica.error.code is not error.code
            replica.error = error
            replica.back_off(refused=refused)
            if refused and new:
                self._report(replica, f"is refused: {error}")

    def _follow_discovery(self, recover: Callable[[Replica], None]) -> None:
        while self._recover is recover:
            for replica in self._discover():
                self._report(replica, "is new")
            with self._changed:
                self._changed.wait_for(lambda: self._recover is not recover, _DISCOVER_S)

    def _discover(self) -> list[Replica]:
        """Return the servers that are new; forget those that are not listed any more."""
        urls = self._discovery.urls()
        for url in [known for known in self.replicas if known not in urls]:
            gone = self.replicas.pop(url)
            self.lost(gone, NotReady("it is not listed any more"))
        new = [Replica(self._connect(url)) for url in urls if url not in self.replicas]
        self.replicas |= {replica.url: replica for replica in new}
        return new


def serve_base(states: Iterable[ServerState]) -> bool:
    """Return whether all servers serve their base now; a merging one does not while it has a run."""
    return all(state.apply != "merge" or not any(run.version for run in state.runs) for state in states)


def _start(name: str, call: Callable[..., None], *args: object) -> None:
    threading.Thread(target=call, args=args, name=f"lockstep-{name}", daemon=True).start()


def _as_lockstep_error(error: Exception) -> LockstepError:
    return error if isinstance(error, LockstepError) else InvalidRequest(f"{type(error).__name__}: {error}")
