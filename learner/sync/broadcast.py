"""The learner's end of a collective group: rank 0, which broadcasts adapters to the workers of one rollout server.

A stateless `torch.distributed` process group, NCCL between GPUs and gloo without. Neither notices a peer that stopped
or was cut off, so every wait here has a deadline; a group that missed one is left and never used again.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from shared.collective import GREETING, NCCL_SETTINGS, POLL_SECONDS, Announcement, GroupInvitation
from shared.errors import NotReady, Timeout
from shared.weights import InFlight, PushReceipt, ServerState


def gpu_uuid(device: torch.device) -> str | None:
    """Return the UUID of a GPU, as servers report theirs; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def can_broadcast(device: torch.device, state: ServerState) -> str | None:
    """Return None if a learner on `device` can share a group with the server, else the reason why not."""
    on_gpu = device.type == "cuda"
    if on_gpu != any(state.devices):
        return f"the learner computes on {device.type}, the server on {state.device}"
    if on_gpu and gpu_uuid(device) in state.devices:
        return "learner and server share a GPU, which NCCL does not allow"
    return None


class SendingGroup:
    """Group of this learner and the workers of one server, which is asked for it.

    Raises:
        Timeout: the workers cannot be reached.
        LockstepError: the server refuses.
    """

    def __init__(self, client: RolloutClient, lease: Lease, device: torch.device) -> None:
        self._client, self._lease = client, lease
        events = client.join_group(lease.run_id, lease.secret)
        invitation = next(events)
        assert isinstance(invitation, GroupInvitation)
        self._timeout_s = invitation.timeout_s
        try:
            self._group: Any = _connect(invitation, client.url, device)
            self.send(torch.tensor([GREETING], dtype=torch.int64, device=device))
            next(events)
        except (RuntimeError, StopIteration) as error:  # torch's own errors: store or peers not reached
            raise Timeout(f"the workers of {client.url} cannot be reached: {error}") from error
        finally:
            events.close()

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast `tensor` to all workers; leave the group if that fails.

        Raises:
            Timeout: it failed, or took too long.
        """
        deadline = time.monotonic() + self._timeout_s
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

    def push(self, announced: Announcement, flat: torch.Tensor, in_flight: InFlight) -> PushReceipt:
        """Announce an adapter, broadcast `flat` (all its tensors, 1-D), and wait for the receipt.

        Raises:
            LockstepError: as `RolloutClient.broadcast`; `Timeout` as `send`.
        """
        events = self._client.broadcast(self._lease.run_id, announced, self._lease.secret, in_flight=in_flight)
        try:
            for event in events:
                if event is not None:
                    return event
                self.send(flat.view(torch.uint8))
        finally:
            events.close()
        raise NotReady(f"{self._client.url} ended a push without a receipt")

    def leave(self) -> None:
        """Leave the group, even in the middle of a broadcast."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _connect(invitation: GroupInvitation, url: str, device: torch.device) -> Any:
    timeout = timedelta(seconds=invitation.timeout_s)
    store = dist.TCPStore(str(urlsplit(url).hostname), invitation.port, is_master=False, timeout=timeout)
    store = dist.PrefixStore(invitation.group, store)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, 0, invitation.size, timeout)
    torch.cuda.set_device(device)
    os.environ.update(NCCL_SETTINGS)
    return dist.ProcessGroupNCCL(store, 0, invitation.size, dist.ProcessGroupNCCL.Options())
