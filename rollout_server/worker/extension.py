"""Worker extension: checks adapter tensors, writes them into a slot and reads them back, inside vLLM's worker process.

vLLM mixes `AdapterWorker` into its worker class and calls it once, after warm-up. From then on the server talks to each
worker over a link of its own (`rollout_server.ipc`), so that a push never waits for an engine step, nor a step for a
push, and every worker of every engine is reached. Writes happen on a thread and a CUDA stream of their own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rollout_server.ipc import tcp
from rollout_server.ipc.memory import SharedMemory, place
from rollout_server.ipc.server import Acknowledge, serve, serve_over_tcp
from rollout_server.vllm_compat import (
    cpu_lora,
    experts,
    kept_mass,
    lora_slots,
    parents,
    pil_processors,
    start_errors,
    topology,
    versions,
)
from rollout_server.worker.receiving_group import ReceivingGroup
from rollout_server.worker.slot_writer import SlotWriter
from shared.adapter_file import Layout, TensorEntry
from shared.errors import InstallFailed

#: For an engine to end its workers by itself.
_LEAVE_S = 10.0

# vLLM imports this module in each worker process before it loads the model.
cpu_lora.install()
versions.keep_blocks_clean()
lora_slots.install()
experts.leave_experts_alone()
pil_processors.do_without_torchvision()
start_errors.report_errors()
if tcp.VARIABLE in os.environ:  # the engine is on several hosts
    parents.end_with_parent(after=_LEAVE_S)


class AdapterWorker:
    """Mixin of vLLM's worker class. The prefix of its names keeps them apart from vLLM's."""

    def lockstep_register(self, slot_ids: list[int], rank: int, link: dict[str, Any]) -> tuple[str, int, str] | None:
        """Pin an empty adapter into each slot and `listen`.

        Called once, after vLLM's own warm-up, which removes all adapters.
        """
        for slot_id in slot_ids:
            lora_slots.pin_empty_adapter(self, slot_id, rank)
        return listen(Operations(self, SlotWriter(self)), link)


class Operations:
    """Operations that the server calls on a worker: all public methods, each on a thread of its own."""

    def __init__(self, worker: Any, writer: Any) -> None:
        self.worker = worker
        self.device: torch.device = worker.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.writer = writer
        self.layouts: dict[str, Layout] = {}  # that fit, by key; the latest last
        self.groups: dict[str, ReceivingGroup] = {}
        self.left: deque[str] = deque(maxlen=256)  # groups; calls have threads of their own and may come late
        self.grouping = threading.Lock()
        self.filling = threading.Lock()
        self.mapping: tuple[int, torch.Tensor] | None = None
        self.storing = threading.Lock()
        self.stored: tuple[int, SharedMemory] | None = None

    def describe(self, _: Acknowledge) -> dict[str, Any]:
        """Describe the layers that can be adapted, and the device: the UUID of a GPU, None for a CPU."""
        cuda = self.device.type == "cuda"
        device = str(torch.cuda.get_device_properties(self.device).uuid) if cuda else None
        return {"device": device, **self.writer.describe()}

    def free_memory(self, _: Acknowledge) -> dict[str, Any]:
        """Return the free bytes of the GPU, after a write under way has ended; None on a CPU."""
        with self.filling:
            return {"free": torch.cuda.mem_get_info(self.device)[0] if self.stream else None}

    def check(self, _: Acknowledge, entries: list[Any]) -> None:
        """Refuse a layout that does not fit; remember the last 64 that do, by their keys."""
        layout = Layout([TensorEntry(n, dtype, tuple(shape), a, b) for n, dtype, shape, a, b in entries])
        self.writer.check(layout)
        self.layouts.pop(layout.key, None)
        self.layouts[layout.key] = layout
        if len(self.layouts) > 64:
            self.layouts.pop(next(iter(self.layouts)))

    def fill(
        self, acknowledge: Acknowledge, slot_id: int, key: str, checksum: str, source: dict[str, Any]
    ) -> dict[str, Any]:
        """Receive an adapter and write it into `slot_id`.

        `source`: `group` and `timeout` of a broadcast; or `path`, `memory` (number) and `offset` in shared memory.
        """
        if not self.filling.acquire(blocking=False):
            raise InstallFailed("another adapter is still being written on this worker")
        try:
            with self._on_own_stream():
                started = time.perf_counter()
                layout = self.layouts[key]
                buffer = self.writer.buffer(layout)
                if "group" in source:
                    try:
                        self._joining(source["group"]).receive(buffer, source["timeout"], posted=acknowledge)
                    except BaseException:
                        self.writer.forget_buffer()
                        raise
                else:
                    buffer.copy_(self._mapped(size=source["offset"] + layout.nbytes, **source))
                received = time.perf_counter()
                modules = self.writer.write(slot_id, layout, checksum)
            written = time.perf_counter()
            return {"modules": modules, "receive_seconds": received - started, "write_seconds": written - received}
        finally:
            self.filling.release()

    def _mapped(self, path: str, memory: int, offset: int, size: int) -> torch.Tensor:
        """Map bytes [offset, size) of shared memory, which stays mapped while `memory`, its number, is the same."""
        if self.mapping is None or self.mapping[0] != memory or len(self.mapping[1]) < size:
            self.mapping = (memory, torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
        return self.mapping[1][offset:size]

    def store(self, _: Acknowledge, number: int, start: int, payload: bytes) -> dict[str, Any]:
        """Store a part of a copy of the server's memory, for all workers of this host.

        Args:
            number: of the copy; that of a later one is larger.
        """
        with self.storing:
            latest, memory = self.stored or (number, SharedMemory.make())
            if number < latest:  # a part that comes late
                raise InstallFailed("this copy of an adapter was given up: another one came after it")
            self.stored = number, memory
            try:
                memory.write(payload, start)
            except OSError as error:
                raise InstallFailed(f"no memory for the adapter on the host of a worker: {error}") from error
            return {"path": memory.path}

    def swap(self, _: Acknowledge, one: int, other: int) -> None:
        """Exchange the adapters of two slots; the engine is paused."""
        lora_slots.swap_adapters(self.worker, one, other)

    def host_group(self, _: Acknowledge, group: str, bind: str, timeout: float) -> dict[str, Any]:
        """Open the store in which the ranks of a group meet."""
        return {"port": self._joining(group).host(bind, timeout)}

    def join_group(
        self, _: Acknowledge, group: str, bind: str, port: int, rank: int, size: int, timeout: float
    ) -> None:
        """Join the learner and the other workers in a group."""
        self._joining(group).join(group, bind, port, rank, size, timeout)

    def close_store(self, _: Acknowledge, group: str) -> None:
        """Close the store of `host_group`; all ranks have met."""
        self._joining(group).close_store()

    def leave_group(self, _: Acknowledge, group: str) -> None:
        """Leave a group, even in the middle of a transfer, or before the call that would have made it comes."""
        with self.grouping:
            self.left.append(group)
            left = self.groups.pop(group, None)
        if left is not None:
            left.abort()

    def _joining(self, group: str) -> ReceivingGroup:
        with self.grouping:
            if group in self.left:
                raise InstallFailed("the collective group was left")
            return self.groups.setdefault(group, ReceivingGroup(self.device))

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Run device work that does not wait for the engine's, and wait for its end."""
        if self.stream is None:
            with torch.inference_mode():
                yield
            return
        torch.cuda.set_device(self.device)
        with torch.cuda.stream(self.stream), torch.inference_mode():
            yield
        self.stream.synchronize()


def listen(operations: Operations, link: dict[str, Any]) -> tuple[str, int, str] | None:
    """Serve the server's calls from now on, and end with its process.

    Args:
        link: `folder` for a Unix socket, `server_pid`, `coordinator_pid` (`versions.coordinator`); or nothing, for a
            server that may be on another host: the secret of the engine has come in this process's environment then.

    Returns:
        Where the worker listens (`ipc.client.WorkerAddress`), if it is over TCP.
    """
    versions.keep_seeds_alive_on_cpu(operations.worker)
    kept_mass.install(operations.worker)
    names = [name for name in dir(type(operations)) if not name.startswith("_")]
    served = {name: getattr(operations, name) for name in names}
    if not link:
        host, secret = (
            topology.node_address(operations.worker.parallel_config),
            bytes.fromhex(os.environ.pop(tcp.VARIABLE)),
        )
        return host, serve_over_tcp(host, secret, served, ended=_end_without_server), f"{host} {place()}"
    threading.Thread(
        target=_end_with, args=(link["server_pid"], link["coordinator_pid"]), name="lockstep-parent", daemon=True
    ).start()
    serve(Path(link["folder"]), served)
    return None


def _end_with(server_pid: int, coordinator_pid: int | None) -> None:
    """End this engine, and the coordinator, when the server's process has gone without stopping them (kill -9, say).

    vLLM's own watch covers workers of a dead engine, but an engine whose server died would hold its GPU forever.
    """
    try:
        process = os.pidfd_open(server_pid)
    except ProcessLookupError:  # it has gone already
        process = None
    except (OSError, AttributeError):  # no Linux: vLLM's own means have to do
        return
    if process is not None:
        select.select([process], [], [])
    engine = os.getppid()
    # None of vLLM's processes watches for this.
    for pid in (coordinator_pid, engine if engine not in (1, server_pid) else None):
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):  # another worker was first
                os.kill(pid, signal.SIGKILL)
    _end()


def _end_without_server() -> None:
    """End this worker, and with it the engine; one whose server leaves in order has ended it before."""
    time.sleep(_LEAVE_S)
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
