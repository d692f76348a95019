"""`share_gpu`: learner and server compute on one GPU by turns, and whoever waits holds as little of it as it can."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from learner.servers.pool import PASSING
from learner.servers.replica import Replica
from learner.sync.broadcast import gpu_uuid
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from shared.weights import ServerState


def check_shared_gpu(state: ServerState, device: torch.device, processes: int) -> None:
    """Refuse to share where there is nothing to share.

    Args:
        device: that the learner trains on.
        processes: of the learner.

    Raises:
        LockstepError: `invalid_request`.
    """
    if not state.shares_gpu:
        raise InvalidRequest("share_gpu: the server has its GPU to itself; start it with --share-gpu")
    if processes > 1:
        raise InvalidRequest(f"share_gpu: {processes} learner processes cannot take turns with one GPU; start one")
    own = gpu_uuid(device)
    if own not in state.devices:
        raise InvalidRequest(
            f"share_gpu: the learner is on {own or device}, the server on {state.devices[0] or state.device}; leave "
            "share_gpu out, or set CUDA_VISIBLE_DEVICES to the same GPU for both"
        )


class GpuSharing:
    """Whose turn it is. A server that is away is not waited for: it holds nothing, and is awake when it comes back.

    Args:
        replica: the only server.

    Attributes:
        seconds: that each change of turns took.
    """

    def __init__(self, replica: Replica, say: Callable[[str], None] = print) -> None:
        self._member, self._say = replica, say
        self.seconds: list[float] = []
        #: Whether the server sleeps, and which epoch of it; None: unknown, an earlier learner may have left it asleep.
        self._asleep: tuple[bool, str] | None = None

    def serve(self) -> None:
        """The server's turn: it is awake from now on, and PyTorch keeps no memory that it does not use."""
        if self._asleep != (False, self._member.known.epoch):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._order(self._member.client.wake)

    def train(self) -> None:
        """The learner's turn: the server sleeps."""
        if self._asleep != (True, self._member.known.epoch):
            self._order(self._member.client.sleep)

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
                if error.code not in PASSING or error.code is ErrorCode.TIMEOUT:
                    raise
                if attempt == 2:  # else it may be that only the answer was lost
                    self._say(f"share_gpu: {self._member.url} is away: {error}")
