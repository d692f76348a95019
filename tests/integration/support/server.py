"""A real rollout server as a separate process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from learner.utils.ports import free_port
from tests.integration.support.forked import ForkedProcess

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Otherwise vLLM binds every engine to the same first cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
#: More than the longest sequences of all tests at once. The whole GiB would take seconds to fill with zeros.
KV_CACHE = ["--num-gpu-blocks-override", "1024"]

#: For requests to local servers: httpx.get and httpx.post load all root certificates each time, which takes seconds on
#: a busy machine.
HTTP = httpx.Client(
    verify=False, trust_env=False, follow_redirects=True, timeout=60.0, limits=httpx.Limits(max_keepalive_connections=0)
)


@contextlib.contextmanager
def running_server(model: Path, folder: Path, *flags: str, forked: bool = True) -> Iterator[ServerProcess]:
    """Run a server, ready and with its log in `folder`, until the end of the block."""
    process = ServerProcess(model, folder / "server.log", *flags, forked=forked)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


class ServerProcess:
    """`rollout-server` on a port of this machine.

    Args:
        forked: begin with the imports done; otherwise as a user starts it.

    Attributes:
        token: which it asks for.
    """

    token: str | None = None

    def __init__(self, model: Path, log: Path, *flags: str, port: int | None = None, forked: bool = True) -> None:
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [str(model), "--port", str(self.port), *KV_CACHE, *flags]
        environment = {**os.environ, **ENVIRONMENT}
        self.process: ForkedProcess | subprocess.Popen
        if forked:
            self.process = ForkedProcess("rollout_server.cli", arguments, log, environment)
            return
        with log.open("wb") as output:
            # In its own session, so that all its child processes can be stopped as one group.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rollout_server.cli", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = 240.0) -> None:
        if (status := self.wait_started(timeout_s)) is not None:
            raise RuntimeError(f"the server ended with {status}:\n{self.tail()}")

    def wait_started(self, timeout_s: float = 240.0) -> int | None:
        """Wait until the server is ready, or has ended; return its exit status if it has."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return self.process.returncode
            try:
                if HTTP.get(self.url + "/ready", timeout=5.0).status_code == 200:
                    return None
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise RuntimeError(f"the server was not ready within {timeout_s} s:\n{self.tail()}")

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def processes(self) -> list[int]:
        """Return the process ids of the server and all its descendants."""
        return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]

    def engine_processes(self) -> list[int]:
        """Return the process ids of vLLM's engine and workers."""
        return [
            child.pid
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name().startswith("VLLM")
        ]

    def metrics(self, name: str) -> list[float]:
        """Return a metric's values, one for each combination of its labels."""
        text = HTTP.get(self.url + "/metrics").text
        return [float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + " ", name + "{"))]

    def metric(self, name: str) -> float:
        """Return the sum of a metric's values over its labels."""
        return sum(self.metrics(name))

    @contextlib.contextmanager
    def frozen_engine(self) -> Iterator[None]:
        """Stop the engine, so that requests sent in the block stay in flight until its end, on any machine."""
        engines = self.engine_processes()
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in engines:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Kill the server and all its processes. How it leaves by itself is for `test_server_process` to see."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
