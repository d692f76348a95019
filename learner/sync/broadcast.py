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

from learner.servers.client import RolloutClient
from shared.collective import GREETING, NCCL_SETTINGS, POLL_SECONDS, Announcement, GroupInvitation
from shared.errors import NotReady, Timeout
from shared.weights import InFlight, PushReceipt, ServerState


def gpu_uuid(device: torch.device) -> str | None:
    """What tells this GPU from all others, on any host, as a server names its own; None on a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def can_broadcast(device: torch.device, state: ServerState) -> str | None:
    """None if a learner on `device` can share a group with the server, else why not."""
    on_gpu = device.type == "cuda"
    if on_gpu != any(state.devices):
        return f"the learner computes on {device.type}, the server on {state.device}"
    if on_gpu and gpu_uuid(device) in state.devices:
        return "learner and server share a GPU, which NCCL does not allow"
    return None


class SendingGroup:
    """The group of this learner and one server."""

    def __init__(self, device: torch.device, group: Any, timeout_s: float) -> None:
        self._device = device
        self._group = group
        self._timeout_s = timeout_s

    @classmethod
    def join(cls, client: RolloutClient, run_id: str, lease: str, device: torch.device) -> SendingGroup:
        """Ask the server for a group and meet its workers.

        Raises:
            LockstepError: `timeout` and what the server refuses.
        """
        events = client.join_group(run_id, lease)
        invitation = next(events)
        assert isinstance(invitation, GroupInvitation)
        try:
            group = cls(device, _connect(invitation, client.url, device), invitation.timeout_s)
            group.send(torch.tensor([GREETING], dtype=torch.int64, device=device))
            next(events)
        except (RuntimeError, StopIteration) as error:  # torch's own errors: store or peers not reached
            raise Timeout(f"the workers of {client.url} cannot be reached: {error}") from error
        finally:
            events.close()
        return group

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast `tensor` to all workers.

        Raises:
            LockstepError: `timeout`; the group is then left.
        """
        deadline = time.monotonic() + self._timeout_s
        try:
            work = self._group.broadcast([tensor], dist.BroadcastOptions())
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise Timeout(f"the rollout server took no broadcast within {self._timeout_s:.0f} s")
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            self.leave()
            raise Timeout(f"the broadcast failed: {error}") from error
        except BaseException:
            self.leave()
            raise

    def push(
        self,
        client: RolloutClient,
        run_id: str,
        announced: Announcement,
        flat: torch.Tensor,
        lease: str,
        in_flight: InFlight,
    ) -> PushReceipt:
        """Announce an adapter, broadcast it, and wait for the receipt.

        Raises:
            LockstepError: as `RolloutClient.push`, and `timeout`.
        """
        events = client.broadcast(run_id, announced, lease, in_flight=in_flight)
        try:
            for event in events:
                if event is not None:
                    return event
                self.send(flat.view(torch.uint8))
        finally:
            events.close()
        raise NotReady(f"{client.url} ended a push without a receipt")

    def leave(self) -> None:
        """Leave the group, even in the middle of a broadcast."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _connect(invitation: GroupInvitation, url: str, device: torch.device) -> Any:
    limit = timedelta(seconds=invitation.timeout_s)
    store = dist.TCPStore(str(urlsplit(url).hostname), invitation.port, is_master=False, timeout=limit)
    store = dist.PrefixStore(invitation.group, store)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, 0, invitation.size, limit)
    torch.cuda.set_device(device)
    os.environ.update(NCCL_SETTINGS)
    return dist.ProcessGroupNCCL(store, 0, invitation.size, dist.ProcessGroupNCCL.Options())
