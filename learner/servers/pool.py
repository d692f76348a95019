"""The rollout servers as one: which there are, which of them serve, and who brings back those that do not.

A server is *up* while it is known to serve what was pushed last; only then it is given requests. Whoever finds that it
does not, says so (`lost`). A thread of its own for each server then tries to bring it back, with growing pauses, so
that a sick one delays nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.replica import Replica
from learner.utils.threads import all_of, first_of, start
from shared.errors import Draining, ErrorCode, InvalidRequest, LockstepError, NotReady, UnknownRun
from shared.weights import ServerState

T = TypeVar("T")
#: Errors of one server that another, or the same one later, need not have.
AWAY = {
    ErrorCode.NOT_READY,
    ErrorCode.TIMEOUT,
    ErrorCode.ENGINE_DEAD,
    ErrorCode.INSTALL_FAILED,
    ErrorCode.NO_FREE_SLOT,
    ErrorCode.CHECKSUM_MISMATCH,
    ErrorCode.OVERLOADED,
    ErrorCode.DRAINING,
}
#: It has restarted, or missed a push: pushing again helps.
FORGOT = {ErrorCode.UNKNOWN_RUN, ErrorCode.VERSION_NOT_ACTIVE, ErrorCode.STEP_NOT_REACHED}
PASSING = AWAY | FORGOT
#: Another learner has the run: nothing is to be waited for.
_FINAL = {ErrorCode.LEASE_MISMATCH, ErrorCode.STALE_VERSION}

_GRACE_S = 10.0
_WATCH_S, _WATCH_TIMEOUT_S, _MISSES = 2.0, 5.0, 3
_DISCOVER_S = 5.0


class ServerPool:
    """All rollout servers.

    Args:
        connect: URL -> client.
        places: where they are.
        patience_s: how long to wait for any server when none is up.
        say: told whenever a server comes or goes.

    Attributes:
        on_change, on_tokens: told of a server's coming and going, and of its completions' tokens; on any thread.
    """

    def __init__(
        self,
        connect: Callable[[str], RolloutClient],
        places: ServerDiscovery,
        *,
        patience_s: float = 600.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self._connect, self._places, self.patience_s, self.say = connect, places, patience_s, say
        self.replicas: dict[str, Replica] = {}
        self.on_change: Callable[[Replica, str], None] = lambda replica, what: None
        self.on_tokens: Callable[[Replica, int], None] = lambda replica, count: None
        self._join: Callable[[Replica], None] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._watch_number = 0

    @classmethod
    def of(cls, client: RolloutClient, state: ServerState | None = None, *, patience_s: float = 0.0) -> ServerPool:
        """One server, which is up."""
        pool = cls(lambda url: client, ServerDiscovery([client.url]), patience_s=patience_s)
        pool.replicas[client.url] = Replica(client, state or client.state())
        return pool

    def meet(self, timeout_s: float) -> list[Replica]:
        """Wait until a server is ready, and for a moment more for the others; they are up then.

        Raises:
            LockstepError: `not_ready` if none is ready, or known, after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not self._discover() and not self.replicas and time.monotonic() < deadline:
            time.sleep(1.0)
        replicas = list(self.replicas.values())
        if not replicas:
            raise _none()
        asked = {start(partial(m.client.wait_ready, timeout_s), f"meet-{m.url}"): m for m in replicas}
        for outcome in first_of(asked, grace_s=_GRACE_S):
            replica = asked[outcome]
            replica.state = outcome.result()
            self.come_up(replica)
        return self.up()

    @property
    def kept(self) -> bool:
        """Whether servers that are lost are brought back."""
        return self._join is not None and not self._closed

    def keep(self, join: Callable[[Replica], None]) -> None:
        """From now on look after all servers.

        Args:
            join: brings a server up to date and calls `come_up`; called on threads, for one server after its failure.
        """
        began, self._join, self._closed = self.kept, join, False
        if began:
            return
        self._watch_number += 1  # threads of an earlier one end
        for replica in list(self.replicas.values()):
            self._look_after(replica)
        if self._places.may_change:
            threading.Thread(target=self._keep_discovering, name="lockstep-fleet", daemon=True).start()

    def close(self) -> None:
        """Look after nobody any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def up(self) -> list[Replica]:
        """Servers that may be given requests."""
        return [replica for replica in list(self.replicas.values()) if replica.up]

    def available(self, suits: Callable[[Replica], bool] = lambda replica: True) -> list[Replica]:
        """Servers that are up and suit, at least one: waits for it.

        Raises:
            LockstepError: the last error of a server, when the patience is over or nobody will bring one back.
        """
        deadline = time.monotonic() + self.patience_s
        with self._changed:
            while True:
                replicas = [replica for replica in self.up() if suits(replica)]
                if replicas:
                    return replicas
                away = [(replica, replica.error) for replica in list(self.replicas.values()) if replica.error]
                errors = [error for _, error in away]
                final = next((error for replica, error in away if replica.incarnation and error.code in _FINAL), None)
                left = deadline - time.monotonic()
                if final or left <= 0 or not self.kept:
                    raise final or (errors[-1] if errors else _none())
                self._changed.wait(min(left, 1.0))

    def ask_all(self, call: Callable[[Replica], T], name: str) -> list[T]:
        """What `call` answers for each server that is up, at once; those it fails on are lost. At least one answer.

        Raises:
            LockstepError: what no other server would do better.
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
            answers = all_of([partial(one, replica) for replica in replicas], name)
            if found := [answer for answer in answers if answer is not None]:
                return found
            if time.monotonic() > deadline:
                raise next((replica.error for replica in replicas if replica.error), _none())

    def lost_or_raise(self, replica: Replica, error: LockstepError, incarnation: int) -> None:
        """`lost` if the error is one that passes, and somebody brings the server back."""
        if error.code not in PASSING or not self.kept:
            raise error
        self.lost(replica, error, incarnation)

    def lost(self, replica: Replica, error: LockstepError, incarnation: int | None = None) -> None:
        """The server does not serve what was pushed last. `incarnation`: in which that was found."""
        with self._changed:
            if not replica.up or incarnation not in (None, replica.incarnation):
                return
            replica.up, replica.error, replica.misses = False, error, 0
            replica.back_off(refused=False)
            self._changed.notify_all()
        self._tell(replica, f"lost: {error}")

    def come_up(self, replica: Replica) -> None:
        """The server serves what was pushed last."""
        with self._changed:
            if replica.up or self.replicas.get(replica.url) is not replica:
                return
            replica.up, replica.error, replica.misses = True, None, 0
            replica.incarnation += 1
            self._changed.notify_all()
        self._tell(replica, "serves")

    def served(self, replica: Replica) -> None:
        """It has answered a request well: its next failure is its first."""
        replica.failures = 0

    def _tell(self, replica: Replica, what: str) -> None:
        self.on_change(replica, what)
        if self.kept:  # before that, whoever waits says it
            replicas = list(self.replicas.values())
            others = f" ({sum(m.up for m in replicas)} of {len(replicas)} serve)" if len(replicas) > 1 else ""
            self.say(f"{replica.url} {what}{others}")

    def _look_after(self, replica: Replica) -> None:
        keeper = partial(self._keeper, replica, self._watch_number)
        threading.Thread(target=keeper, name=f"lockstep-keep-{replica.url}", daemon=True).start()

    def _keeper(self, replica: Replica, number: int) -> None:
        while not self._closed and number == self._watch_number and self.replicas.get(replica.url) is replica:
            if replica.up:
                self._watch(replica)
            elif time.monotonic() >= replica.retry_at:
                self._bring_back(replica)
            with self._changed:
                if replica.up:
                    self._changed.wait_for(lambda: self._closed or not replica.up, _WATCH_S)
                else:
                    self._changed.wait_for(
                        lambda: self._closed, max(0.05, min(replica.retry_at - time.monotonic(), 1.0))
                    )

    def _watch(self, replica: Replica) -> None:
        """Ask it what it serves: it may have restarted, or hang, while nobody asks it anything else."""
        receipt, incarnation = replica.receipt, replica.incarnation
        try:
            state = replica.client.state(timeout_s=_WATCH_TIMEOUT_S)
        except Exception as caught:
            error = _known(caught)
            replica.misses += 1
            if error.code is not ErrorCode.TIMEOUT or replica.misses >= _MISSES:
                self.lost(replica, error, incarnation)
            return
        replica.misses = 0
        if state.draining:
            self.lost(replica, Draining("it is about to leave"), incarnation)
        if not replica.pushing and replica.receipt is receipt and not replica.serves_receipt(state):
            self.lost(replica, UnknownRun("it no longer serves what it was sent"), incarnation)

    def _bring_back(self, replica: Replica) -> None:
        assert self._join
        try:
            self._join(replica)
        except Exception as caught:  # a keeper that dies would lose its server for good
            error = _known(caught)
            refused = error.code not in PASSING
            new = replica.error is None or replica.error.code is not error.code
            replica.error = error
            replica.back_off(refused=refused)
            if refused and new:
                self._tell(replica, f"is refused: {error}")
            with self._changed:
                self._changed.notify_all()

    def _keep_discovering(self) -> None:
        number = self._watch_number
        while not self._closed and number == self._watch_number:
            for replica in self._discover():
                self._tell(replica, "is new")
                self._look_after(replica)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _DISCOVER_S)

    def _discover(self) -> list[Replica]:
        """Servers that were not known; those that are not listed any more are forgotten."""
        urls = self._places.urls()
        for url in [known for known in self.replicas if known not in urls]:
            gone = self.replicas.pop(url)
            self.lost(gone, NotReady("it is not listed any more"))
        new = [Replica(self._connect(url)) for url in urls if url not in self.replicas]
        for replica in new:
            self.replicas[replica.url] = replica
        return new


def serve_base(states: Iterable[ServerState]) -> bool:
    """Whether every one of these serves its base now; one that merges does not while a run lives."""
    return all(state.apply == "adapter" or not any(run.version for run in state.runs) for state in states)


def _known(error: Exception) -> LockstepError:
    if isinstance(error, LockstepError):
        return error
    return InvalidRequest(f"{type(error).__name__}: {error}")


def _none() -> LockstepError:
    return NotReady("no rollout server is up; start one, or check rollout_url")
