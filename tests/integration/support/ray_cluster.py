"""A Ray cluster on this machine: each node has its own raylet and its own address on the loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil

from learner.utils.ports import free_port
from tests.integration.support.forked import REPOSITORY
from tests.integration.support.waiting import until
from tests.support.arguments import arguments

_READY = "Ray runtime started"
_STORE = 80 * 2**20
_STARTS, _START_S = 5, 300.0


class RayNode:
    """One node; `cpus` and `gpus` are labels, as Ray's always are.

    Args:
        head: address of the cluster's head; None: it is the head.
    """

    def __init__(self, folder: Path, number: int, cpus: int, head: str | None = None, gpus: int = 0) -> None:
        self.host, self.folder = f"127.0.1.{number}", folder / f"node-{number}"
        self.folder.mkdir(parents=True)
        self.address = head or f"{self.host}:{free_port()}"
        flags: dict[str, object] = {"--node-ip-address": self.host, "--num-cpus": cpus, "--object-store-memory": _STORE}
        flags |= {"--num-gpus": gpus, "--include-log-monitor": "false", "--temp-dir": self.folder, "--block": None}
        if head:
            flags["--address"] = head
        else:
            flags |= {"--head": None, "--port": self.address.split(":")[1], "--include-dashboard": "false"}
            flags["--ray-client-server-port"] = free_port()
        self._command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments(flags)]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_DISABLE_MEMORY_MONITOR": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with (self.folder / "start.log").open("wb") as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until it has joined. Ray gives up after 30 s, which a busy machine may need: then it is tried again."""
        log = self.folder / "start.log"
        for _ in range(_STARTS):
            until(lambda: _READY in log.read_text() or self.process.poll() is not None, _START_S)
            if self.process.poll() is None:
                return
            self.process = self._start()
        raise AssertionError(log.read_text())

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the node: Ray's, and what runs below its workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def running(self, *modules: str) -> list[psutil.Process]:
        """Return the processes on the node that run one of these modules, and what those have started."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if set(modules) & set(process.cmdline()):
                    found += [process, *process.children(recursive=True)]
        return found

    def kill(self) -> None:
        """Kill everything on the node at once, as when its power fails."""
        everything = self.processes()
        for process in [psutil.Process(self.process.pid), *everything] if self.process.poll() is None else everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
