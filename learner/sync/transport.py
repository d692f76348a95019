"""Transport of adapters to one server: by broadcast where learner and server have GPUs of their own, else over HTTP.

A run starts over HTTP and joins a collective group with the workers meanwhile. If the group fails, the push goes on
over HTTP, logs it, and a new group is joined later.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Literal

import torch

from learner.adapters.exporter import AdapterExport
from learner.run_dir.lease import Lease
from learner.servers.replica import Replica
from learner.sync.broadcast import SendingGroup, can_broadcast
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from shared.weights import InFlight, PushReceipt

Choice = Literal["auto", "http", "collective"]
#: Failures of the broadcast rather than of the adapter.
_BROADCAST_FAILURES = {
    ErrorCode.TIMEOUT,
    ErrorCode.NO_GROUP,
    ErrorCode.INSTALL_FAILED,
    ErrorCode.CHECKSUM_MISMATCH,
    ErrorCode.NOT_READY,
    ErrorCode.UNKNOWN_RUN,
}
_FIRST_RETRY_S, _LAST_RETRY_S = 15.0, 900.0

logger = logging.getLogger("lockstep.sync")


class Transport:
    """Sends the adapters of one run to one server.

    Args:
        device: of the exported adapter.
        choice: `auto` broadcasts between different GPUs; `collective` also between CPUs (gloo), waits for the group
            before the second push and refuses where there can be none; `http` never broadcasts.
        in_flight: what happens to running requests when a push lands.

    Raises:
        InvalidRequest: `collective` where there can be no group.
    """

    def __init__(
        self, replica: Replica, lease: Lease, device: torch.device, choice: Choice, in_flight: InFlight
    ) -> None:
        self._client, self._lease, self._device, self._in_flight = replica.client, lease, device, in_flight
        obstacle = can_broadcast(device, replica.known)
        if choice == "collective" and obstacle:
            raise InvalidRequest(f"transport=collective: {obstacle}; use transport=auto")
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
                return self._group.push(export.announcement(), export.flat, self._in_flight)
            except LockstepError as error:
                if error.code in _BROADCAST_FAILURES:
                    self._give_up(f"the broadcast of {export.manifest.version} failed, it goes over HTTP: {error}")
                elif error.code is not ErrorCode.UNKNOWN_LAYOUT:
                    raise
        receipt = self._client.push(
            self._lease.run_id, export.pieces(), self._lease.secret, takeover=takeover, in_flight=self._in_flight
        )
        self._join_soon()
        return receipt

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.leave()
        self._group, self._may_broadcast = None, False

    def _join_soon(self) -> None:
        """Start to join a group, unless that is under way, unwanted, or has just failed."""
        idle = self._joining is None or not self._joining.is_alive()
        if self._may_broadcast and self._group is None and idle and time.monotonic() >= self._retry_at:
            self._joining = threading.Thread(target=self._join, name="lockstep-join", daemon=True)
            self._joining.start()
            if self._waits:
                self._joining.join()

    def _join(self) -> None:
        started = time.monotonic()
        try:
            group = SendingGroup(self._client, self._lease, self._device)
        except LockstepError as error:
            self._give_up(f"no collective group with the rollout server, pushes go over HTTP: {error}")
            return
        if not self._may_broadcast:  # closed meanwhile
            group.leave()
            return
        self._group, self._retry_s = group, _FIRST_RETRY_S
        logger.info("pushes go by broadcast from now on (group made in %.1f s)", time.monotonic() - started)

    def _give_up(self, why: str) -> None:
        if self._group is not None:
            self._group.leave()
        self._group = None
        self._retry_at = time.monotonic() + self._retry_s
        logger.info("%s; next attempt at a group in %.0f s", why, self._retry_s)
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
