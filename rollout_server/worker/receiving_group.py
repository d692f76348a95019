"""The receiving end of a collective group: the learner (rank 0) and the workers of one server (ranks 1, 2, ...).

A stateless `torch.distributed` process group, NCCL between GPUs and gloo without. Neither notices a peer that stopped
or was cut off, so every wait has a deadline and can be ended by `abort`; a group is never used again after that.

The ranks meet in a store that takes commands from everybody who reaches it, and that no backend needs afterwards. No
rank's group holds it, so that `close_store` ends it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shared.collective import GREETING, NCCL_SETTINGS, POLL_SECONDS
from shared.errors import InstallFailed, Timeout


def meeting_host(bind: str) -> str:
    """Return the address at which workers reach a socket bound to `bind`; on every interface: those of this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)


class ReceivingGroup:
    """One worker's rank in one group. What fails, or is left, keeps no socket and no communicator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._store: Any = None
        self._group: Any = None
        self._left = threading.Event()
        self._changing = threading.Lock()

    def host(self, bind: str, timeout: float) -> int:
        """Open the store in which the ranks meet, on the address `bind`, and return its port."""
        # torch would listen on all interfaces.
        listening = socket.create_server((bind, 0), family=socket.AF_INET6 if ":" in bind else socket.AF_INET)
        port = int(listening.getsockname()[1])
        limit, fd = timedelta(seconds=timeout), listening.detach()
        store = dist.TCPStore(
            meeting_host(bind), port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=fd
        )
        self._keep("_store", store)
        return port

    def close_store(self) -> None:
        """Close the store and all connections to it, once all ranks have met."""
        with self._changing:
            self._store = None

    def join(self, name: str, bind: str, port: int, rank: int, size: int, timeout: float) -> None:
        """Join the other ranks at the address `bind` of `host` and receive the learner's greeting; raises `timeout`."""
        limit = timedelta(seconds=timeout)
        deadline = time.monotonic() + timeout
        try:
            store = dist.PrefixStore(name, dist.TCPStore(meeting_host(bind), port, is_master=False, timeout=limit))
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                os.environ.update(NCCL_SETTINGS)
                self._keep("_group", dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options()))
            else:
                self._keep("_group", dist.ProcessGroupGloo(store, rank, size, limit))
            greeting = torch.zeros(1, dtype=torch.int64, device=self._device)
            self.receive(greeting, deadline - time.monotonic())
            if greeting.item() != GREETING:
                raise InstallFailed("the learner's greeting arrived garbled")
        except BaseException:
            self.abort()
            raise

    def receive(self, buffer: torch.Tensor, timeout: float, posted: Callable[[], None] = lambda: None) -> None:
        """Receive the learner's next broadcast into `buffer`; call `posted` as soon as the learner may send.

        Raises `timeout` after leaving the group. After an error the buffer must not be used again.
        """
        deadline, group = time.monotonic() + timeout, self._group
        if group is None:
            raise _left()
        work = group.broadcast([buffer], dist.BroadcastOptions())
        posted()
        while not work.is_completed():
            if self._left.is_set() or time.monotonic() > deadline:
                self.abort()
                raise Timeout(f"no adapter arrived from the learner's collective group within {timeout:.1f} s")
            time.sleep(POLL_SECONDS)
        work.wait()

    def abort(self) -> None:
        """Leave the group, also one that is still being joined. A `receive` under way ends with an error."""
        self._left.set()
        with self._changing:
            group, self._group, self._store = self._group, None, None
        if group is not None:
            group.abort()

    def _keep(self, name: str, value: Any) -> None:
        """Keep the store or the group, unless all was left while it was being made."""
        with self._changing:
            if not self._left.is_set():
                setattr(self, name, value)
                return
        if name == "_group":
            value.abort()
        raise _left()


def _left() -> InstallFailed:
    return InstallFailed("the collective group was left")
