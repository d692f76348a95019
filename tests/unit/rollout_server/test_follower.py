"""A host that is not the head: meets it, runs its workers, and ends with it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from learner.utils.ports import free_port
from rollout_server import follower, lifecycle
from rollout_server.ipc import tcp
from rollout_server.ipc.hosts import Head, Meeting
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import hosts_executor
from shared.errors import EngineDead

TOKEN = "a-token-of-all-hosts"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.2")
    parallel = {"master_addr": "127.0.0.1", "master_port": free_port(), "nnodes": 2, "node_rank": 1, "world_size": 2}
    parallel |= {"distributed_executor_backend": "mp", "distributed_timeout_seconds": 10}
    monkeypatch.setattr(lifecycle.served_model, "terms", lambda config, settings: {"--apply": settings.apply})
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel))


class _Workers:
    """In place of vLLM's executor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.secret, self.fail = "", None
        self.end, self.loaded = threading.Event(), threading.Event()
        monkeypatch.setattr(hosts_executor, "load", self._load)
        monkeypatch.setattr(hosts_executor, "first_to_end", self._first_to_end)
        monkeypatch.setattr(follower.multiprocessing, "active_children", lambda: [self])
        monkeypatch.setattr(follower, "_HEAD_S", 0.2)

    def _load(self, config: object) -> object:
        self.secret = os.environ[tcp.VARIABLE]
        if self.fail:
            try:
                raise self.fail
            except ValueError:
                logging.getLogger("vllm").exception("WorkerProc failed to start.")
            raise RuntimeError("see root cause above")
        self.loaded.set()
        return self

    def _first_to_end(self, executor: object) -> str:
        self.end.wait(20.0)
        return "worker 1 has ended (-9)"

    def terminate(self) -> None:
        self.end.set()

    kill = terminate

    def join(self, timeout: float) -> None: ...


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> _Workers:
    return _Workers(monkeypatch)


async def _begin(config: SimpleNamespace) -> tuple[Head, asyncio.Task[int]]:
    meeting: Meeting = lifecycle.meeting(config, ServerSettings(), TOKEN)
    assert meeting.timeout == 10.0
    head = Head(meeting, lambda reason: None)
    following = asyncio.ensure_future(follower.follow(config, ServerSettings(), TOKEN))
    await head.meet()
    return head, following


async def test_it_ends_with_the_head(config, workers: _Workers) -> None:
    head, following = await _begin(config)
    assert await asyncio.to_thread(workers.loaded.wait, 5.0)
    # What the head derives, too; the workers' environment alone has it.
    assert bytes.fromhex(workers.secret) == lifecycle.links_secret(TOKEN)
    head.close()
    with pytest.raises(EngineDead, match=r"the head \(127\.0\.0\.1:\d+\) has ended"):
        await asyncio.wait_for(following, 10.0)
    assert workers.end.is_set()
    assert tcp.VARIABLE not in os.environ


async def test_a_worker_that_ends_ends_the_engine(config, workers: _Workers) -> None:
    head, following = await _begin(config)
    workers.end.set()
    with pytest.raises(EngineDead, match=r"worker 1 has ended \(-9\)"):
        await asyncio.wait_for(following, 10.0)
    said = "host 1 of the engine (10.0.0.2, worker 1) has ended: worker 1 has ended (-9)"
    assert await head.reason(5.0) == said
    head.close()


async def test_the_head_hears_why_a_worker_did_not_start(config, workers: _Workers, monkeypatch) -> None:
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "handlers", [])
    reported = follower.start_errors.reported_errors

    def reporting():
        found = reported()
        enter = found.__enter__

        class _Block:
            def __enter__(self):
                first = enter()
                follower.start_errors.report_errors()  # as a worker's process does
                return first

            def __exit__(self, *exc):
                return found.__exit__(*exc)

        return _Block()

    monkeypatch.setattr(follower.start_errors, "reported_errors", reporting)
    workers.fail = ValueError("no weight of that name")
    head, following = await _begin(config)
    with pytest.raises(EngineDead, match="could not start the workers: ValueError: no weight of that name"):
        await asyncio.wait_for(following, 10.0)
    assert "has ended: vLLM could not start the workers: ValueError: no weight" in str(await head.reason(5.0))
    head.close()


async def test_sigterm_ends_it_and_the_head_hears_that(config, workers: _Workers) -> None:
    head, following = await _begin(config)
    assert await asyncio.to_thread(workers.loaded.wait, 5.0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(following, 10.0) == 0
    assert workers.end.is_set()
    assert str(await head.reason(5.0)).endswith("has ended: it was asked to end")
    head.close()


async def test_a_head_that_never_comes(config, workers: _Workers) -> None:
    config.parallel_config.distributed_timeout_seconds = 1
    with pytest.raises(EngineDead, match=r"did not come within 1 s \(--distributed-timeout-seconds\)"):
        await asyncio.wait_for(follower.follow(config, ServerSettings(), TOKEN), 10.0)
    assert not workers.secret
