"""A rollout server without an engine, in a process of its own: every layer of HTTP is the real one.

`python -m tests.unit.rollout_server.api.served` forks one for each line that it reads, such as `[{"most": 64}, LOG]`,
and prints its process id and port: its imports take seconds, and are done once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvloop
from fastapi import FastAPI

from rollout_server.api.app import build_app
from rollout_server.api.connections import ConnectionLimits, Connections, connections_that_fit
from rollout_server.api.middleware.auth import AuthMiddleware
from rollout_server.api.middleware.limits import LimitsMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import Role
from rollout_server.api.server import HttpServer
from rollout_server.engine.capacity import Capacity
from rollout_server.generation import requests
from rollout_server.settings import ServerSettings
from shared.rollouts import GenerateRequest, RolloutGroup
from shared.weights import RunState

TOKEN, GENERATE_TOKEN = "a-token-for-weights", "a-token-for-generating"
GROUP = RolloutGroup(prompt_index=0, prompt_token_ids=[1], completions=[])


async def _generate(body: GenerateRequest, *_: Any) -> Any:
    """Yield `n` groups, one each 0.1 s: `max_tokens` says how large."""
    for _group in range(body.sampling.n):
        yield GROUP.model_copy(update={"prompt_token_ids": [1] * (body.sampling.max_tokens or 0)})
        await asyncio.sleep(0.1)


async def serve(given: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    tokens = Tokens({}, {Role.WEIGHTS: TOKEN, Role.GENERATE: GENERATE_TOKEN}) if given.get("tokens", True) else None
    settings = replace(ServerSettings(), max_body_mib=1)
    capacity, readiness = Capacity(settings), ReadinessMiddleware()
    if given.get("full"):
        capacity.sequences = settings.max_sequences
    if given.get("draining"):
        capacity.drain()
    state = RunState(run_id="r", version=None, checksum=None, install_seq=None, slots=[], running_requests=0)
    runs = SimpleNamespace(get=lambda _: SimpleNamespace(state=lambda: state))
    service = SimpleNamespace(runs=runs, proxy=None, exclusive=None, served=SimpleNamespace(epoch="e"))
    requests.generate = _generate  # type: ignore[assignment]
    if not given.get("loading"):
        readiness.open(LimitsMiddleware(build_app(service, FastAPI()), settings, capacity))  # type: ignore[arg-type]
    if "descriptors" in given:
        resource.setrlimit(resource.RLIMIT_NOFILE, (given["descriptors"] // 2, given["descriptors"]))
    most = given.get("most") or connections_that_fit()
    connections = Connections(most, replace(ConnectionLimits(), **given.get("limits", {})))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        print(os.getpid(), listening.getsockname()[1], flush=True)
        tls = given.get("tls", {})
        server = HttpServer(
            AuthMiddleware(readiness, tokens), connections=connections, timeout_graceful_shutdown=1, **tls
        )
        await server.serve(sockets=[listening])


class Served:
    """The process, as seen by a test."""

    def __init__(self, pid: int, port: int, log: Path, ca: str | None) -> None:
        self.port, self.log = port, log
        self.url = f"http://127.0.0.1:{port}"
        self._pid = pid
        # Made once: it takes long enough to be noticed in `health_seconds`.
        self._http = httpx.Client(
            base_url=f"http{'s' if ca else ''}://127.0.0.1:{port}",
            verify=ssl.create_default_context(cafile=ca) if ca else False,
            limits=httpx.Limits(max_keepalive_connections=0),
            timeout=5,
        )

    def connect(self) -> socket.socket:
        """Open a connection, of TCP only."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def memory_mib(self) -> int:
        """Return the resident memory of the process."""
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

    def get(self, path: str, token: str | None = None) -> httpx.Response:
        """Send a request on a connection of its own."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._http.get(path, headers=headers)

    def health_seconds(self) -> float:
        """Return how long `/health` takes."""
        began = time.monotonic()
        assert self.get("/health").status_code == 200
        return time.monotonic() - began


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """Start what forks the servers; it ends with this process."""
    command = [sys.executable, "-m", __name__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def served(log: Path, given: dict[str, Any], ca: str | None = None) -> Iterator[Served]:
    """Start a server; `given` is read by `serve`."""
    forks = _forks()
    assert forks.stdin is not None
    assert forks.stdout is not None
    print(json.dumps([given, str(log)]), file=forks.stdin, flush=True)
    pid, port = map(int, forks.stdout.readline().split())
    process = os.pidfd_open(pid)
    try:
        yield Served(pid, port, log, ca)
    finally:
        os.kill(pid, signal.SIGTERM)
        assert select.select([process], [], [], 20)[0], "it has not ended"
        os.close(process)


def _run(given: dict[str, Any], log: str) -> None:
    """Be a server, in a process that was forked for it."""
    sys.stdin.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    try:
        (uvloop if given.get("loop") != "asyncio" else asyncio).run(serve(given))
    except BaseException:
        traceback.print_exc()
        print(flush=True)  # for who waits for its port
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none is left as a zombie
    for line in sys.stdin:
        if os.fork() == 0:
            _run(*json.loads(line))
