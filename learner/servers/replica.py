"""One rollout server as the learner knows it: last reported state, last push, load."""

from __future__ import annotations

import random
import threading
import time

from learner.servers.client import RolloutClient
from shared.errors import LockstepError
from shared.weights import PushReceipt, ServerState

MAX_PARALLEL_REQUESTS = 8
#: Weight of the latest measurement in a moving average.
NEWEST = 0.3
_SECOND_RETRY_S, _LAST_RETRY_S, _REFUSED_RETRY_S = 0.2, 10.0, 15.0


class Load:
    """Outstanding work of one server, and its speed.

    Attributes:
        outstanding: tokens requested and not yet received.
        speed: tokens per second while it was busy; None: not measured yet.
        tokens: received so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.outstanding = 0.0
        self.speed: float | None = None
        self.tokens = 0
        self._tokens_before, self._busy_since = 0, 0.0

    def begin(self, expected: float) -> None:
        """Count `expected` tokens as requested."""
        with self._lock:
            if self.outstanding <= 0:
                self._tokens_before, self._busy_since = self.tokens, time.monotonic()
            self.outstanding += expected

    def end(self, expected: float, tokens: int = 0) -> None:
        """Count `expected` of the requested tokens as done: `tokens` have come, or none of them will."""
        with self._lock:
            self.outstanding -= expected
            self.tokens += tokens
            if self.outstanding > 0.5:
                return
            self.outstanding = 0.0
            seconds = time.monotonic() - self._busy_since
            received = self.tokens - self._tokens_before
            if received and seconds > 0:
                speed = received / seconds
                self.speed = speed if self.speed is None else (1 - NEWEST) * self.speed + NEWEST * speed


class Replica:
    """One rollout server.

    Attributes:
        state: last reported state; None: never reached.
        receipt: of the last push; None: nothing was pushed since the server started.
        up: it may be given requests and pushes.
        incarnation: number of times it came up.
        error: why it is not up.
        pushing: a push is under way, so it may serve a newer version than that of `receipt`.
        heard_at: when it last answered, or was asked in vain, by the monotonic clock.
        attended: a thread checks it, or tries to recover it.
        request_slots: bounds the learner's concurrent requests.
    """

    def __init__(self, client: RolloutClient, state: ServerState | None = None) -> None:
        self.client, self.state = client, state
        self.url = client.url
        self.load = Load()
        self.request_slots = threading.BoundedSemaphore(MAX_PARALLEL_REQUESTS)
        self.receipt: PushReceipt | None = None
        self.up = state is not None
        self.incarnation = int(self.up)
        self.pushing = self.attended = False
        self.heard_at = 0.0
        self.error: LockstepError | None = None
        self.failures = self.misses = 0
        self.retry_at = 0.0

    @property
    def known(self) -> ServerState:
        """Last reported state of a server that has been reached."""
        assert self.state is not None
        return self.state

    def heard(self) -> None:
        """Note that it has just answered as it should: its health need not be asked for."""
        self.heard_at, self.misses = time.monotonic(), 0

    def serves_receipt(self, state: ServerState) -> bool:
        """Return whether `state` is of the process and version of `receipt`."""
        receipt = self.receipt
        return receipt is None or (
            state.epoch == receipt.epoch
            and any((run.version, run.checksum) == (receipt.version, receipt.checksum) for run in state.runs)
        )

    def back_off(self, *, refused: bool) -> None:
        """Schedule the next retry: at once after the first failure, then exponentially later, with jitter."""
        self.failures += 1
        growing = _SECOND_RETRY_S * 2 ** min(self.failures - 2, 10) if self.failures > 1 else 0.0
        pause = _REFUSED_RETRY_S if refused else min(growing, _LAST_RETRY_S)
        self.retry_at = time.monotonic() + pause * random.uniform(0.75, 1.25)
