"""Servers as child processes: start, wait until they are ready, end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from learner.utils.ports import free_port
from learner.utils.processes import ProcessGroup

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Rendezvous of processes of one machine, which may have no other network.
    "VLLM_HOST_IP": "127.0.0.1",
}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
#: Why nothing can be broadcast there.
SAME_GPU = "the learner computes on a GPU of the server, and NCCL joins no two processes on one"


class Server:
    """A server on a port of this machine, in a process group of its own."""

    def __init__(
        self, name: str, command: Sequence[str], port: int, log: Path, env: Mapping[str, str], *, ready: str = "/health"
    ) -> None:
        self.name, self.port, self.log, self.ready = name, port, log, ready
        self.url = f"http://127.0.0.1:{port}"
        self.started = time.monotonic()
        self.start_s: float | None = None
        self._group = ProcessGroup(list(command), env, log)

    def is_ready(self) -> bool:
        """Whether the server answers 200."""
        try:
            return httpx.get(self.url + self.ready, timeout=5.0, verify=False).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server is ready.

        Raises:
            RuntimeError: it ended or the time is over; with the end of its log.
        """
        while not self.is_ready():
            if (status := self._group.process.poll()) is not None:
                raise RuntimeError(f"{self.name} ended with status {status}; {self.tail()}")
            if time.monotonic() > self.started + timeout_s:
                raise RuntimeError(f"{self.name} was not ready within {timeout_s:.0f} s; {self.tail()}")
            time.sleep(0.25)
        self.start_s = time.monotonic() - self.started

    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return self._group.process.poll() is not None

    def gpu_memory(self) -> int | None:
        """Return MiB that its processes hold by nvidia-smi; None where it does not list them."""
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        total = 0
        for entry in answer.splitlines():
            with contextlib.suppress(ValueError, OSError):  # "[N/A]", or a process of another machine's
                pid, mib = (int(cell) for cell in entry.split(","))
                # All processes of a server are in the session that it leads.
                total += mib if os.getsid(pid) == self._group.process.pid else 0
        return total or None

    @property
    def pid(self) -> int:
        """The process that leads the group."""
        return self._group.process.pid

    def processor_s(self) -> float:
        """Return the processor time of that process alone: vLLM's engine and workers are its children."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """Kill it and its children at once, with SIGKILL."""
        os.killpg(self.pid, signal.SIGKILL)

    def tail(self, characters: int = 600) -> str:
        """Return the last errors of the log, or its end."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        errors = [line for line in lines if "Error" in line]
        return f"log {self.log}: ...{' | '.join(errors[-3:] or lines[-3:])[-characters:]}"

    def end(self) -> None:
        """Stop it and its children."""
        self._group.end()


@dataclass(frozen=True)
class Setting:
    """Where servers run and with which flags."""

    work: Path  # for logs
    device: str  # of the learner: cpu or cuda:N
    server_device: str | None  # CUDA_VISIBLE_DEVICES of every server; None on a CPU
    dtype: str
    engine_flags: tuple[str, ...]

    @property
    def same_gpu(self) -> bool:
        """Whether the learner computes on a GPU of the servers'."""
        if self.device == "cpu" or self.server_device is None:
            return False
        return visible_device(torch.device(self.device).index) in self.server_device.split(",")

    def start(
        self, name: str, module: Sequence[str], log: str, *flags: str, ready: str = "/health", port: int = 0, **env: str
    ) -> Server:
        """Start `python -m MODULE...` with a port, these flags and those of the engine; it need not be ready.

        Args:
            log: name of its log file.
            port: 0: any that is free.
        """
        port = port or free_port()
        command = [sys.executable, "-m", *module, "--host", "127.0.0.1", "--port", str(port), *flags]
        command += self.engine_flags
        return Server(name, command, port, self.work / log, environment(self.server_device, env), ready=ready)


def vllm_serve(folder: Path) -> list[str]:
    """Return the words after `python -m` of `vllm serve MODEL`; vllm-cpu has it under another name."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return ["vllm.entrypoints.cli.main", "serve", str(folder)]


def environment(server_device: str | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a server on a GPU (None: on the CPU); variables that are set here win."""
    defaults = {**ENVIRONMENT, **(CPU_ENVIRONMENT if server_device is None else {})}
    chosen = {name: os.environ.get(name, value) for name, value in defaults.items()}
    if server_device is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = server_device
    return {**chosen, **(extra or {})}


def visible_device(index: int) -> str:
    """Return GPU `index` of those this process sees as CUDA_VISIBLE_DEVICES of a child."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return visible[index] if visible else str(index)
