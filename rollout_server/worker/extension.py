"""Runs inside vLLM's worker processes: checks adapter tensors, writes them into a slot and reads them back.

vLLM mixes `AdapterWorker` into its worker class and calls it once, after warm-up. From then on the server talks to each
worker over a socket of its own (`worker_link`), so that a push never waits for an engine step, nor a step for a push,
and every worker of every engine is reached. Writing happens on a thread and a CUDA stream of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rollout_server.ipc import server as worker_link
from rollout_server.vllm_compat import versions
from rollout_server.worker.receiving_group import ReceivingGroup
from shared.adapter_file import Layout, TensorEntry
from shared.errors import InstallFailed

# vLLM imports this module in each worker process before it loads the model.
versions.speed_up_cpu_lora()


class AdapterWorker:
    """Mixed into vLLM's worker. Every name carries the prefix, so that it never meets one of vLLM's."""

    def lockstep_register(self, slot_ids: list[int], rank: int, server_pid: int, folder: str) -> None:
        """Pin an empty adapter into each slot, and listen in `folder`; once, after vLLM's own warm-up (which removes
        all adapters)."""
        from rollout_server.worker.slot_writer import SlotWriter

        for slot_id in slot_ids:
            versions.pin_empty_adapter(self, slot_id, rank)
        listen(Operations(self, SlotWriter(self)), server_pid, folder)


class Operations:
    """What the server can ask of a worker. Each call runs on a thread of its own and answers a plain dict."""

    def __init__(self, worker: Any, writer: Any) -> None:
        self.worker = worker
        self.device: torch.device = worker.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.writer = writer
        self.groups: dict[str, ReceivingGroup] = {}
        self.filling = threading.Lock()
        self.mapping: tuple[int, torch.Tensor] | None = None

    def table(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Operations by name."""
        return {
            "describe": self.describe,
            "free_memory": self.free_memory,
            "check": self.check,
            "fill": self.fill,
            "swap": self.swap,
            "host_group": self.host_group,
            "join_group": self.join_group,
            "leave_group": self.leave_group,
        }

    def describe(self, tell: worker_link.Tell) -> dict[str, Any]:
        """What this worker can adapt, and on which device."""
        return {"ok": True, "device": _device_id(self.device), **self.writer.describe()}

    def free_memory(self, tell: worker_link.Tell) -> dict[str, Any]:
        """Bytes that nobody has taken of the GPU, after what is being written now; None on a CPU."""
        with self.filling:
            return {"ok": True, "free": torch.cuda.mem_get_info(self.device)[0] if self.stream else None}

    def check(self, tell: worker_link.Tell, entries: list[Any]) -> dict[str, Any]:
        """Would an adapter of this layout fit? It is then known by its key."""
        layout = Layout([TensorEntry(n, dtype, tuple(shape), a, b) for n, dtype, shape, a, b in entries])
        return self.writer.check(layout)

    def fill(
        self,
        tell: worker_link.Tell,
        slot_id: int,
        key: str,
        checksum: str,
        *,
        path: str = "",
        memory: int = -1,
        offset: int = 0,
        group: str | None = None,
        timeout: float = 0.0,
    ) -> dict[str, Any]:
        """Receive an adapter, from a file in shared memory or from a group, and write it into `slot_id`."""
        if not self.filling.acquire(blocking=False):
            raise InstallFailed("another adapter is still being written on this worker")
        try:
            with self.on_own_stream():
                started = time.perf_counter()
                layout = self.writer.layout(key)
                buffer = self.writer.buffer(layout)
                if group is not None:
                    try:
                        self.groups[group].receive(buffer, timeout, posted=lambda: tell({"receiving": True}))
                    except BaseException:
                        self.writer.forget_buffer()
                        raise
                else:
                    buffer.copy_(self._mapped(path, memory, offset + layout.nbytes)[offset:])
                received = time.perf_counter()
                modules = self.writer.write(slot_id, layout, checksum)
            return {
                "ok": True,
                "modules": modules,
                "receive_seconds": received - started,
                "write_seconds": time.perf_counter() - received,
            }
        finally:
            self.filling.release()

    def _mapped(self, path: str, memory: int, size: int) -> torch.Tensor:
        """The first `size` bytes of shared memory. The server uses it again, so it stays mapped."""
        if self.mapping is None or self.mapping[0] != memory or len(self.mapping[1]) < size:
            self.mapping = (memory, torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
        return self.mapping[1][:size]

    def swap(self, tell: worker_link.Tell, one: int, other: int) -> dict[str, Any]:
        """Exchange what two slots hold; the engine is paused."""
        versions.swap_adapters(self.worker, one, other)
        return {"ok": True}

    def host_group(self, tell: worker_link.Tell, group: str, bind: str, timeout: float) -> dict[str, Any]:
        """Be the place where a group's members meet."""
        self.groups[group] = ReceivingGroup(self.device)
        return {"ok": True, "port": self.groups[group].host(bind, timeout)}

    def join_group(
        self, tell: worker_link.Tell, group: str, bind: str, port: int, rank: int, size: int, timeout: float
    ) -> dict[str, Any]:
        """Meet the learner and the other workers in a group."""
        self.groups.setdefault(group, ReceivingGroup(self.device)).join(group, bind, port, rank, size, timeout)
        return {"ok": True}

    def leave_group(self, tell: worker_link.Tell, group: str) -> dict[str, Any]:
        """Leave a group, even in the middle of a transfer."""
        left = self.groups.pop(group, None)
        if left is not None:
            left.abort()
        return {"ok": True}

    @contextlib.contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """What runs inside does not wait for the engine's work on the device, and has ended at the end."""
        if self.stream is None:
            with torch.inference_mode():
                yield
            return
        torch.cuda.set_device(self.device)
        with torch.cuda.stream(self.stream), torch.inference_mode():
            yield
        self.stream.synchronize()


def listen(operations: Operations, server_pid: int, folder: str) -> None:
    """From now on answer the server's calls, and end with its process."""
    threading.Thread(target=_end_with, args=(server_pid,), name="lockstep-parent", daemon=True).start()
    versions.keep_seeds_alive_on_cpu(operations.worker)
    versions.report_kept_mass(operations.worker)
    worker_link.serve(Path(folder), operations.table())


def _device_id(device: torch.device) -> str | None:
    """What tells this GPU from all others, on any host; None on a CPU."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _end_with(server_pid: int) -> None:
    """End this engine when the HTTP server's process has gone without stopping it (kill -9, say).

    vLLM's own watch covers workers of a dead engine, but an engine whose server died would hold its GPU for ever.
    """
    try:
        server = os.pidfd_open(server_pid)
    except (OSError, AttributeError):  # on another host, or no Linux: vLLM's own means have to do
        return
    select.select([server], [], [])
    engine = os.getppid()
    if engine not in (1, server_pid):
        os.kill(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
