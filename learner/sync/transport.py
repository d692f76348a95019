"""How adapters travel: by broadcast where learner and server have GPUs of their own, over HTTP everywhere else.

A run starts over HTTP and meets the workers in a collective group meanwhile. Whatever happens to the group, the push
goes on over HTTP, says so, and the group is made anew later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

import torch

from learner.adapters.exporter import AdapterExport
from learner.servers.client import RolloutClient
from learner.sync.broadcast import SendingGroup, can_broadcast
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from shared.weights import InFlight, PushReceipt, ServerState

Choice = Literal["auto", "http", "collective"]
#: Failures of the way, not of what was sent.
_OF_THE_WAY = {
    ErrorCode.TIMEOUT,
    ErrorCode.NO_GROUP,
    ErrorCode.INSTALL_FAILED,
    ErrorCode.CHECKSUM_MISMATCH,
    ErrorCode.NOT_READY,
    ErrorCode.UNKNOWN_RUN,
}
_FIRST_RETRY_S, _LAST_RETRY_S = 15.0, 900.0


class Transport:
    """Sends the adapters of one run to one server.

    Args:
        choice: `auto` broadcasts between different GPUs; `collective` also between CPUs (gloo), waits for the group
            before the second push and refuses where there can be none; `http` never broadcasts.
        in_flight: what becomes of requests that run while a push arrives.
        say: told whenever the way changes.

    Raises:
        LockstepError: `invalid_request` for `collective` where there can be no group.
    """

    def __init__(
        self,
        client: RolloutClient,
        run_id: str,
        lease: str,
        device: torch.device,
        state: ServerState,
        choice: Choice = "auto",
        in_flight: InFlight = "drain",
        say: Callable[[str], None] = print,
    ) -> None:
        self._client, self._run_id, self._lease, self._device, self._say = client, run_id, lease, device, say
        obstacle = can_broadcast(device, state)
        if choice == "collective" and obstacle:
            raise InvalidRequest(f"transport=collective: {obstacle}; use transport=auto")
        self._in_flight = in_flight
        self._waits = choice == "collective"
        self._may_broadcast = choice == "collective" or (choice == "auto" and not obstacle and device.type == "cuda")
        self._group: SendingGroup | None = None
        self._joining: threading.Thread | None = None
        self._retry_at, self._retry_s = 0.0, _FIRST_RETRY_S

    def send(self, export: AdapterExport, *, takeover: bool = False) -> PushReceipt:
        """Push one adapter.

        Raises:
            LockstepError: as `RolloutClient.push`.
        """
        if self._group is not None and not takeover:
            try:
                announced = export.announcement()
                return self._group.push(
                    self._client, self._run_id, announced, export.flat, self._lease, self._in_flight
                )
            except LockstepError as error:
                if error.code is not ErrorCode.UNKNOWN_LAYOUT and error.code not in _OF_THE_WAY:
                    raise
                if error.code in _OF_THE_WAY:
                    self._give_up(f"the broadcast of {export.manifest.version} failed, it goes over HTTP: {error}")
        receipt = self._client.push(
            self._run_id, export.pieces(), self._lease, takeover=takeover, in_flight=self._in_flight
        )
        self._join_soon()
        return receipt

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.leave()
        self._group, self._may_broadcast = None, False

    def _join_soon(self) -> None:
        """Begin to make a group, unless that is under way, not wanted, or has just failed."""
        idle = self._joining is None or not self._joining.is_alive()
        if self._may_broadcast and self._group is None and idle and time.monotonic() >= self._retry_at:
            self._joining = threading.Thread(target=self._join, name="lockstep-join", daemon=True)
            self._joining.start()
            if self._waits:
                self._joining.join()

    def _join(self) -> None:
        started = time.monotonic()
        try:
            group = SendingGroup.join(self._client, self._run_id, self._lease, self._device)
        except LockstepError as error:
            self._give_up(f"no collective group with the rollout server, pushes go over HTTP: {error}")
            return
        if not self._may_broadcast:  # closed meanwhile
            group.leave()
            return
        self._group, self._retry_s = group, _FIRST_RETRY_S
        self._say(f"pushes go by broadcast from now on (group made in {time.monotonic() - started:.1f} s)")

    def _give_up(self, why: str) -> None:
        if self._group is not None:
            self._group.leave()
        self._group = None
        self._retry_at = time.monotonic() + self._retry_s
        self._say(f"{why}; next attempt at a group in {self._retry_s:.0f} s")
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
