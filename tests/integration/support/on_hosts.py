"""A real rollout server whose workers are on two hosts (`--nnodes 2`): processes of this machine with two addresses."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from learner.utils.ports import free_port
from shared.bearer_tokens import TOKEN_VARIABLE
from tests.integration.support.forked import ForkedProcess
from tests.integration.support.server import ENVIRONMENT, HTTP, KV_CACHE, ServerProcess

HEAD, OTHER = "127.0.0.1", "127.0.0.2"
TOKEN = "a-token-that-all-hosts-have"


@contextlib.contextmanager
def running_on_hosts(model: Path, folder: Path, *flags: str) -> Iterator[ServerOnHosts]:
    """Run a server with a worker on each host, ready and with its logs in `folder`, until the end of the block."""
    process = ServerOnHosts(model, folder, *flags)
    HTTP.headers["Authorization"] = f"Bearer {TOKEN}"
    try:
        process.wait_ready()
        yield process
    finally:
        del HTTP.headers["Authorization"]
        process.stop()


class ServerOnHosts(ServerProcess):
    """The head, `rollout-server --nnodes 2 --tensor-parallel-size 2`, and `--node-rank 1`, which starts first.

    Args:
        others: flags of the other host, in place of the head's.

    Attributes:
        follower: the process of the other host.
    """

    token = TOKEN

    def __init__(self, model: Path, folder: Path, *flags: str, others: tuple[str, ...] | None = None) -> None:
        spread = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", HEAD]
        spread += ["--master-port", str(free_port())]
        self.follower_log = folder / "follower.log"
        arguments = [str(model), *KV_CACHE, *(flags if others is None else others), *spread, "--node-rank", "1"]
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(TOKEN_VARIABLE, TOKEN)
            self.follower = _started(arguments, self.follower_log, environment)
            environment.setenv("VLLM_HOST_IP", HEAD)
            super().__init__(model, folder / "server.log", *flags, *spread)

    def processes_of_hosts(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """Return all processes of the head, and of the other host."""
        head, other = (psutil.Process(process.pid) for process in (self.process, self.follower))
        return [head, *head.children(recursive=True)], [other, *other.children(recursive=True)]

    def worker(self, rank: int) -> psutil.Process:
        """Return the process of a worker, which is on the host of this rank."""
        (found,) = (process for process in self.processes_of_hosts()[rank] if "Worker" in process.name())
        return found

    def stop(self) -> None:
        """Kill both hosts."""
        super().stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.follower.pid, signal.SIGKILL)
        self.follower.wait()


def _started(arguments: list[str], log: Path, environment: pytest.MonkeyPatch) -> ForkedProcess:
    environment.setenv("VLLM_HOST_IP", OTHER)
    return ForkedProcess("rollout_server.cli", arguments, log, {**os.environ, **ENVIRONMENT})
