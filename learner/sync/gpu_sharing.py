"""`share_gpu`: learner and server take turns on one GPU; the one that waits holds as little memory as it can."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from learner.servers.compatibility import check_shares_gpu
from learner.servers.pool import RECOVERABLE
from learner.servers.replica import Replica
from learner.sync.transport import gpu_uuid
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from shared.weights import ServerState

logger = logging.getLogger("lockstep.sync")


def check_shared_gpu(state: ServerState, device: torch.device, processes: int) -> None:
    """Check that the server can share the GPU `device` with `processes` learner processes.

    Raises:
        InvalidRequest: it cannot.
    """
    check_shares_gpu(state)
    if processes > 1:
        raise InvalidRequest(f"share_gpu: {processes} learner processes cannot take turns with one GPU; start one")
    own = gpu_uuid(device)
    if own not in state.devices:
        raise InvalidRequest(
            f"share_gpu: the learner is on {own or device}, the server on {state.devices[0] or state.device}; leave "
            "share_gpu out, or set CUDA_VISIBLE_DEVICES to the same GPU for both"
        )


class GpuSharing:
    """Hands the GPU back and forth between the learner and its only server.

    A server that is away is not waited for: it holds no memory, and is awake when it comes back.

    Attributes:
        seconds: duration of each handover.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.seconds: list[float] = []
        #: Whether the server sleeps, and its boot_id. None: unknown, an earlier learner may have left it asleep.
        self._asleep: tuple[bool, str] | None = None

    def yield_gpu(self) -> None:
        """Wake the server, after freeing PyTorch's unused memory."""
        if self._asleep != (False, self._replica.known.epoch):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._order(self._replica.client.wake)

    def take_gpu(self) -> None:
        """Put the server to sleep."""
        if self._asleep != (True, self._replica.known.epoch):
            self._order(self._replica.client.sleep)

    def _order(self, order: Callable[[], ServerState]) -> None:
        started = time.perf_counter()
        self._asleep = None
        for attempt in (1, 2):
            try:
                state = order()
                self._asleep = state.asleep, state.epoch
                self.seconds.append(time.perf_counter() - started)
                return
            except LockstepError as error:
                if error.code not in RECOVERABLE or error.code is ErrorCode.TIMEOUT:
                    raise
                if attempt == 2:  # the first time, only the response may have been lost
                    logger.info("share_gpu: %s is away: %s", self._replica.url, error)
