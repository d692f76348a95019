"""Two real servers under one learner: one is killed and comes back at its old address."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from learner.agents.agent_session import AgentSession
from learner.agents.calls import FunctionAgent
from learner.agents.episodes import Episodes
from learner.rollouts.completions import AllowedVersion
from learner.rollouts.dispatch import Dispatcher, group_requests
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from shared.sampling import SamplingParams
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP, ServerProcess
from tests.integration.support.waiting import until

PROMPTS = [[i, *range(20, 40)] for i in range(50, 74)]


@pytest.fixture
def second(model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(model, tmp_path / "second.log", *FLAGS)
    yield process
    process.stop()


def test_a_server_that_is_killed_and_comes_back(
    server: ServerProcess, second: ServerProcess, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lockstep")
    second.wait_ready()
    policy = P.make_policy(model)
    urls = [server.url, second.url]
    pool = ServerPool(RolloutClient, ServerDiscovery(urls), patience_s=120.0)
    assert len(pool.wait_ready(30.0)) == 2
    publisher = Publisher(pool, policy, Lease("fleet", P.LEASE, 0), takeover=True)
    tokens = dict.fromkeys(urls, 0)

    def count(replica, count):
        tokens[replica.url] += count

    pool.on_tokens = count
    dispatcher = Dispatcher(pool, SamplingParams(max_tokens=300, ignore_eos=True), max_model_len=1024)

    def fetch(step: int) -> None:
        """Check that all completions have this version and come from servers that are up."""
        before = dict(tokens)
        completions = dispatcher.dispatch(group_requests(PROMPTS), lambda: AllowedVersion(publisher.version(step)))
        assert len(completions) == len(PROMPTS)
        assert {span.version for c in completions for span in c.spans} == {publisher.version(step)}
        worked.update({url: tokens[url] - before[url] for url in urls})

    with closing(pool):
        worked: dict[str, int] = {}
        publisher.push(0)
        pool.supervise(lambda replica: publisher.catch_up(replica, lambda client, state: None))
        fetch(0)
        assert min(worked.values()) >= 300 * 8

        killed = threading.Timer(0.3, lambda: os.killpg(second.process.pid, signal.SIGKILL))
        killed.start()
        fetch(0)
        killed.join()
        assert sum(worked.values()) == 300 * len(PROMPTS), "no group came twice"
        until(lambda: [replica.url for replica in pool.up()] == [server.url])
        P.randomize(policy, seed=77)
        assert publisher.push(1).workers == 1
        fetch(1)
        assert worked == {server.url: 300 * len(PROMPTS), second.url: 0}

        again = ServerProcess(model, tmp_path / "again.log", *FLAGS, port=second.port)
        try:
            again.wait_ready()
            until(lambda: len(pool.up()) == 2, 60.0)
            fetch(1)
            assert min(worked.values()) > 0
            with RolloutClient(again.url) as client:
                answer = P.generate(client, PROMPTS[:4], policy=publisher.version(1), max_tokens=8)
            assert P.largest_gap(policy, answer) < 1e-4, "it was sent the version that it missed"
            _kill_with_episodes_open(pool, again, AllowedVersion(publisher.version(1)))
            publisher.delete_run()
        finally:
            again.stop()
    assert any("lost" in line and "1 of 2 serve" in line for line in caplog.messages)


def _kill_with_episodes_open(pool: ServerPool, victim: ServerProcess, version: AllowedVersion) -> None:
    """Check that a server that is killed costs the episodes that run on it, which are run again, and nothing else."""
    begun, killed = list[str](), threading.Event()

    def agent(session: AgentSession, row: Mapping[str, Any]) -> float:
        def ask() -> None:
            body = {"model": session.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
            HTTP.post(f"{session.base_url}/chat/completions", json=body).raise_for_status()

        ask()
        begun.append(session.base_url)
        assert killed.wait(240.0)
        ask()
        return 1.0

    def kill() -> None:
        until(lambda: len(begun) == len(PROMPTS), 240.0)
        os.killpg(victim.process.pid, signal.SIGKILL)
        killed.set()

    episodes = Episodes(FunctionAgent(agent), pool, SamplingParams(max_tokens=8))
    rows = [{"prompt": str(prompt)} for prompt in PROMPTS]
    killing = threading.Thread(target=kill)
    killing.start()
    done = episodes.run(rows, group_requests(PROMPTS), lambda: version)
    killing.join()
    on_victim = sum(url.startswith(victim.url) for url in begun[: len(PROMPTS)])
    assert 0 < on_victim < len(PROMPTS)
    assert [(each.failure, each.reward, each.calls) for each in done] == [(None, 1.0, 2)] * len(PROMPTS)
    assert len(begun) == len(PROMPTS) + on_victim, "only those were run again"
    counts = episodes.counts
    assert (counts.run, counts.lost, counts.failed, counts.left_out) == (len(PROMPTS), on_victim, 0, 0)
