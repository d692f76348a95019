"""A Ray cluster on this machine: each node has its own raylet and its own address on the loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from learner.utils.ports import free_port
from tests.support.arguments import arguments

REPOSITORY = Path(__file__).parents[2]
_READY = "Ray runtime started"
_STORE = 80 * 2**20
_STARTS, _START_S = 5, 300.0


class RayCluster:
    """Nodes on this machine, all of which are killed at the end of the block.

    Args:
        environment: variables of all that runs on them.

    Attributes:
        nodes: all there ever were, the head first.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.nodes: list[RayNode] = []
        self._environment = environment or {}
        # Not below pytest's folder, which is deeper with several workers: Ray's sockets must have short paths.
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all nodes."""
        for node in reversed(self.nodes):
            node.kill()
        self._folder.cleanup()

    @property
    def address(self) -> str:
        """Return where the head listens."""
        return self.nodes[0].address

    def running_nodes(self) -> list[RayNode]:
        """Return the nodes that have not been killed."""
        return [node for node in self.nodes if node.process.poll() is None]

    def add(self, cpus: int, gpus: int = 0) -> RayNode:
        """Start another node, which is not awaited, at an address of its own; `cpus` and `gpus` are labels."""
        head = self.address if self.nodes else None
        folder, number = Path(self._folder.name), len(self.nodes) + 1
        self.nodes.append(RayNode(folder, number, cpus, head, gpus, self._environment))
        return self.nodes[-1]


class RayNode:
    """One node; `cpus` and `gpus` are labels, as Ray's always are.

    Args:
        head: address of the cluster's head; None: it is the head.
        environment: variables of all that runs on it.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        cpus: int,
        head: str | None = None,
        gpus: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment or {}
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
            **self._environment,
        }
        with (self.folder / "start.log").open("wb") as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until it has joined. Ray gives up after 30 s, which a busy machine may need: then it is tried again."""
        log = self.folder / "start.log"
        for _ in range(_STARTS):
            deadline = time.monotonic() + _START_S
            while self.process.poll() is None and time.monotonic() < deadline:
                if _READY in log.read_text():
                    return
                time.sleep(0.05)
            self.kill()
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

    def kill_raylet(self) -> None:
        """Kill Ray's own process on the node; the others are left to notice."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    process.kill()

    def kill(self) -> None:
        """Kill everything on the node at once, as when its power fails."""
        everything = self.processes()
        for process in [psutil.Process(self.process.pid), *everything] if self.process.poll() is None else everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
