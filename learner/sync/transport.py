"""Transport of adapters to one server: by broadcast where learner and server have GPUs of their own, else over HTTP.

A run starts over HTTP and joins a collective group with the workers meanwhile: a stateless `torch.distributed` process
group, NCCL between GPUs and gloo without, in which the learner is rank 0. Neither backend notices a peer that stopped
or was cut off, so every wait has a deadline; a group that missed one is left and never used again. The push then goes
on over HTTP, logs it, and a new group is joined later.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import closing
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from learner.adapters.exporter import AdapterExport
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.replica import Replica
from shared.collective import GREETING, NCCL_SETTINGS, POLL_SECONDS, Announcement, GroupInvitation
from shared.errors import ErrorCode, InvalidRequest, LockstepError, NoGroup, NotReady, Timeout
from shared.weights import InFlight, PushReceipt, ServerState

Choice = Literal["auto", "http", "collective"]
#: Failures of the broadcast rather than of the adapter.
_BROADCAST_FAILURES = {
    ErrorCode.TIMEOUT,
    ErrorCode.NO_GROUP,
    ErrorCode.INSTALL_FAILED,
    ErrorCode.INTERNAL_ERROR,
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
        obstacle = can_broadcast(device, replica.known, asked=choice == "collective")
        if choice == "collective" and obstacle:
            raise InvalidRequest(f"transport=collective: {obstacle}; use transport=auto")
        self._waits = choice == "collective"
        self._may_broadcast = choice == "collective" or (choice == "auto" and not obstacle and device.type == "cuda")
        self._group: SendingGroup | None = None
        self._joining: threading.Thread | None = None
        self._retry_at, self._retry_s = 0.0, _FIRST_RETRY_S
        self._changing = threading.Lock()

    def send(self, export: AdapterExport, *, takeover: bool = False) -> PushReceipt:
        """Push one adapter, and afterwards begin to join a group, unless that is unwanted or has just failed.

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
        idle = self._joining is None or not self._joining.is_alive()
        if self._may_broadcast and self._group is None and idle and time.monotonic() >= self._retry_at:
            self._joining = threading.Thread(target=self._join, name="lockstep-join", daemon=True)
            self._joining.start()
            if self._waits:
                self._joining.join()
        return receipt

    def close(self) -> None:
        """Leave the group, also one that is being joined."""
        with self._changing:
            group, self._group, self._may_broadcast = self._group, None, False
        if group is not None:
            group.leave()

    def _join(self) -> None:
        started = time.monotonic()
        try:
            group = SendingGroup(self._client, self._lease, self._device)
        except LockstepError as error:
            self._give_up(f"no collective group with the rollout server, pushes go over HTTP: {error}")
            return
        with self._changing:
            closed = not self._may_broadcast
            if not closed:
                self._group, self._retry_s = group, _FIRST_RETRY_S
        if closed:
            group.leave()
            return
        logger.info("pushes go by broadcast from now on (group made in %.1f s)", time.monotonic() - started)

    def _give_up(self, why: str) -> None:
        if self._group is not None:
            self._group.leave()
        self._group = None
        self._retry_at = time.monotonic() + self._retry_s
        logger.info("%s; next attempt at a group in %.0f s", why, self._retry_s)
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)


def gpu_uuid(device: torch.device) -> str | None:
    """Return the UUID of a GPU, as servers report theirs; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def can_broadcast(device: torch.device, state: ServerState, *, asked: bool = False) -> str | None:
    """Return None if a learner on `device` can share a group with the server, else the reason why not.

    Args:
        asked: the user wants a group, and may have told NCCL that both are on two hosts.
    """
    on_gpu = device.type == "cuda"
    if on_gpu != any(state.devices):
        return f"the learner computes on {device.type}, the server on {state.device}"
    # NCCL knows processes of one GPU by host and bus; with another name of the host it takes them for those of two.
    told = asked and "NCCL_HOSTID" in os.environ
    if on_gpu and gpu_uuid(device) in state.devices and not told:
        return "learner and server share a GPU, which NCCL does not allow"
    return None


class SendingGroup:
    """Group of this learner and the workers of one server, which both join here.

    Raises:
        Timeout: the workers cannot be reached.
        LockstepError: the server refuses.
    """

    def __init__(self, client: RolloutClient, lease: Lease, device: torch.device) -> None:
        self._client, self._lease = client, lease
        with closing(client.join_group(lease.run_id, lease.secret)) as events:
            invitation = next(events, None)
            if not isinstance(invitation, GroupInvitation):
                raise NotReady(f"{client.url} invites to no collective group")
            self._timeout_s = invitation.timeout_s
            self._group: Any = None
            try:
                self._group = _connect(invitation, client.url, device)
                self.send(torch.tensor([GREETING], dtype=torch.int64, device=device))
                if list(events) != [None]:
                    raise NotReady(f"{client.url} ended the meeting of a collective group early")
            except BaseException as error:
                self.leave()
                if isinstance(error, RuntimeError):  # torch's own errors: store or peers not reached
                    raise Timeout(f"the workers of {client.url} cannot be reached: {error}") from error
                raise

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast `tensor` to all workers; leave the group if that fails.

        Raises:
            Timeout: it failed, or took too long.
        """
        deadline, work = time.monotonic() + self._timeout_s, None
        try:
            work = self._group.broadcast([tensor], dist.BroadcastOptions())
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise Timeout(f"the rollout server took no broadcast within {self._timeout_s:.0f} s")
                time.sleep(POLL_SECONDS)
            work.wait()
        except BaseException as error:
            self.leave()
            if isinstance(error, RuntimeError):
                raise Timeout(f"the broadcast failed: {error}") from error
            raise
        finally:
            del work  # it holds the group's connections, and an error may be kept with this frame

    def push(self, announced: Announcement, flat: torch.Tensor, in_flight: InFlight) -> PushReceipt:
        """Announce an adapter, broadcast `flat` (all its tensors, 1-D), and wait for the receipt.

        Raises:
            LockstepError: as `RolloutClient.broadcast`; `Timeout` as `send`.
        """
        lease = self._lease
        with closing(self._client.broadcast(lease.run_id, announced, lease.secret, in_flight=in_flight)) as events:
            for event in events:
                if event is not None:
                    return event
                if self._group is None:
                    raise NoGroup("the collective group was left")
                self.send(flat.view(torch.uint8))
        raise NotReady(f"{self._client.url} ended a push without a receipt")

    def leave(self) -> None:
        """Leave the group, even in the middle of a broadcast."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _connect(invitation: GroupInvitation, url: str, device: torch.device) -> Any:
    timeout = timedelta(seconds=invitation.timeout_s)
    host = invitation.host or str(urlsplit(url).hostname)
    store = dist.TCPStore(host, invitation.port, is_master=False, timeout=timeout)
    store = dist.PrefixStore(invitation.group, store)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, 0, invitation.size, timeout)
    torch.cuda.set_device(device)
    os.environ.update(NCCL_SETTINGS)
    return dist.ProcessGroupNCCL(store, 0, invitation.size, dist.ProcessGroupNCCL.Options())
