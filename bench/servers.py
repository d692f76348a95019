"""Servers as child processes: start, wait until they answer, end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from learner.processes import ProcessGroup

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


class Server:
    """A server on a port of this machine, in a process group of its own."""

    def __init__(
        self, name: str, command: Sequence[str], port: int, log: Path, env: Mapping[str, str], *, ready: str = "/health"
    ) -> None:
        self.name, self.port, self.log, self.ready = name, port, log, ready
        self.url = f"http://127.0.0.1:{port}"
        self.command = list(command)
        self.started = time.monotonic()
        self.start_s: float | None = None
        self._group = ProcessGroup(self.command, env, log)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server answers 200.

        Raises:
            RuntimeError: it ended, or the time is over; with the end of its log.
        """
        deadline = self.started + timeout_s
        while self.start_s is None:
            if (status := self._group.process.poll()) is not None:
                raise RuntimeError(f"{self.name} ended with status {status}; {self.tail()}")
            try:
                if httpx.get(self.url + self.ready, timeout=5.0).status_code == 200:
                    self.start_s = time.monotonic() - self.started
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} was not ready within {timeout_s:.0f} s; {self.tail()}")
            time.sleep(0.25)

    def tail(self, characters: int = 600) -> str:
        """The last errors of the log, or its end."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        errors = [line for line in lines if "Error" in line]
        return f"log {self.log}: ...{' | '.join(errors[-3:] or lines[-3:])[-characters:]}"

    def end(self) -> None:
        """Stop it and whatever it started."""
        self._group.end()


def environment(server_device: str | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a server on the given GPU (None: on the CPU); what the caller has set stays."""
    defaults = {**ENVIRONMENT, **(CPU_ENVIRONMENT if server_device is None else {})}
    chosen = {name: os.environ.get(name, value) for name, value in defaults.items()}
    if server_device is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = server_device
    return {**chosen, **(extra or {})}


def visible_device(index: int) -> str:
    """GPU `index` of those this process sees, as CUDA_VISIBLE_DEVICES names it for a child."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return visible[index] if visible else str(index)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
