"""One rollout server, as a learner knows it."""

from __future__ import annotations

import random
import threading
import time

from learner.servers.client import RolloutClient
from learner.servers.router import Load
from shared.errors import LockstepError
from shared.weights import PushReceipt, ServerState

MAX_PARALLEL_REQUESTS = 8
_SECOND_RETRY_S, _LAST_RETRY_S, _REFUSED_RETRY_S = 0.2, 10.0, 15.0


class Replica:
    """One rollout server.

    Attributes:
        state: what it last said of itself; None: never reached.
        receipt: of what it was last sent; None: nothing since it started.
        up: it is given requests and pushes.
        incarnation: counts how often it came up.
        error: why it is not up.
        pushing: a push is under way, so that what it serves may be ahead of `receipt`.
    """

    def __init__(self, client: RolloutClient, state: ServerState | None = None) -> None:
        self.client, self.state = client, state
        self.url = client.url
        self.load = Load()
        self.places = threading.BoundedSemaphore(MAX_PARALLEL_REQUESTS)
        self.receipt: PushReceipt | None = None
        self.up = state is not None
        self.incarnation = int(self.up)
        self.pushing = False
        self.error: LockstepError | None = None
        self.failures = 0
        self.retry_at = 0.0
        self.misses = 0

    @property
    def known(self) -> ServerState:
        """Its state; it has been reached."""
        assert self.state is not None
        return self.state

    def restarted(self, state: ServerState) -> None:
        """It is another process than before, which knows nothing."""
        self.state, self.receipt = state, None

    def serves_receipt(self, state: ServerState) -> bool:
        """Whether `state` is that of the process and version that `receipt` is for."""
        receipt = self.receipt
        return receipt is None or (
            state.epoch == receipt.epoch
            and any((run.version, run.checksum) == (receipt.version, receipt.checksum) for run in state.runs)
        )

    def back_off(self, *, refused: bool) -> None:
        """Try again: at once after the first failure, then later each time, and not all servers together."""
        self.failures += 1
        growing = _SECOND_RETRY_S * 2 ** min(self.failures - 2, 10) if self.failures > 1 else 0.0
        pause = _REFUSED_RETRY_S if refused else min(growing, _LAST_RETRY_S)
        self.retry_at = time.monotonic() + pause * random.uniform(0.75, 1.25)
