"""Servers with several workers, on one host, two, or two nodes of a Ray cluster: every worker receives every push.

Each layout has one server, and all tests run on all of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from shared.errors import ErrorCode, LockstepError
from shared.weights import WeightVersion
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.in_flight import check_every_span, generate_across_pushes
from tests.integration.support.on_cluster import ServerOnCluster, running_on, two_nodes
from tests.integration.support.on_hosts import ServerOnHosts, running_on_hosts
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import HTTP, ServerProcess, running_server

PUSH_TIMEOUT_S = 8.0


@pytest.fixture(scope="module", params=["tensor", "data", "nnodes", "ray"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(layout: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = [*FLAGS, "--push-timeout", str(PUSH_TIMEOUT_S)]
    if layout == "ray":
        with two_nodes() as cluster, running_on(cluster, model, tmp_path_factory.mktemp(layout), *flags) as process:
            yield process
        return
    if layout == "nnodes":
        with running_on_hosts(model, tmp_path_factory.mktemp(layout), *flags) as process:
            yield process
        return
    flags += [f"--{layout}-parallel-size", "2"]
    with pytest.MonkeyPatch.context() as environment:
        # By default every worker wants a NUMA node of its own.
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("OMP_NUM_THREADS", "1")
        with running_server(model, tmp_path_factory.mktemp(layout), *flags) as process:
            yield process


@pytest.fixture
def engines(layout: str) -> int:
    return 2 if layout == "data" else 1


def _gaps(client: RolloutClient, policy, engines: int) -> list[float]:
    """Return the logprob gap of a completion by each engine, through vLLM's own route, which can choose the engine."""
    gaps = []
    for rank in range(engines):
        body = {
            "model": "policy",
            "prompt": PROBE,
            "max_tokens": 8,
            "temperature": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = HTTP.post(
            f"{client.url}/v1/completions", json=body, headers={"X-data-parallel-rank": str(rank)}, timeout=30.0
        )
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        expected = P.reference(policy, PROBE + choice["token_ids"])[len(PROBE) - 1 :]
        gaps.append(float((torch.tensor(choice["logprobs"]["token_logprobs"]) - expected).abs().max()))
    return gaps


def test_pushes_reach_every_worker_over_both_transports(client: RolloutClient, model: Path, engines: int) -> None:
    state = client.state()
    assert state.workers == len(state.devices) == 2
    policy = P.make_policy(model)
    publisher = Publisher(
        ServerPool.of(client, state),
        policy,
        Lease("both", P.LEASE, 0),
        takeover=True,
        transport="collective",
    )
    transports = []
    for step in range(3):
        P.randomize(policy, seed=step)
        receipt = publisher.push(step)
        transports.append(receipt.transport)
        assert receipt.workers == 2
        assert max(_gaps(client, policy, engines)) < FP32
    assert transports == ["http", "collective", "collective"]
    answer = P.generate(client, [[i, *PROBE] for i in range(10, 14)], n=2, max_tokens=16)
    assert P.largest_gap(policy, answer) < FP32
    publisher.close()


def test_a_refused_push_changes_nothing_on_any_worker(client: RolloutClient, model: Path, engines: int) -> None:
    served, other = P.make_policy(model), P.make_policy(model)
    P.randomize(served, seed=10)
    P.randomize(other, seed=11)
    P.push(client, served, "refused", 0)
    before = P.score(client, PROBE)
    version = WeightVersion(run_id="refused", fence=0, step=1)
    altered = bytearray(P.blob(other, version, client.state().base.weights))
    altered[-9] ^= 1
    with pytest.raises(LockstepError) as refusal:
        client.push("refused", [bytes(altered)], P.LEASE)
    assert refusal.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert client.run("refused").version == WeightVersion(run_id="refused", fence=0, step=0)
    assert max(_gaps(client, served, engines)) < FP32
    if engines == 1:  # else another engine may answer, with other roundings
        assert torch.equal(P.score(client, PROBE), before)
    P.push(client, other, "refused", 2)
    assert max(_gaps(client, other, engines)) < FP32


def test_keep_moves_the_requests_of_every_engine(client: RolloutClient, server: ServerProcess, model: Path) -> None:
    policies = [P.make_policy(model) for _ in range(3)]
    for seed, policy in enumerate(policies):
        P.randomize(policy, seed=20 + seed)
    workers = []
    answer = generate_across_pushes(
        client, server, policies, "keep", after_push=lambda receipt: workers.append(receipt.workers)
    )
    assert set(workers) == {2}
    check_every_span(answer, policies, "keep")


def test_one_stopped_worker_is_one_acknowledgement_missing(
    client: RolloutClient, server: ServerProcess, model: Path, engines: int
) -> None:
    served, other = P.make_policy(model), P.make_policy(model)
    P.randomize(served, seed=30)
    P.randomize(other, seed=31)
    P.push(client, served, "stopped", 0)
    worker = _last_worker(server)
    os.kill(worker, signal.SIGSTOP)
    try:
        started = time.monotonic()
        # Over TCP it is the copy that does not arrive.
        late = (
            "1 of 1 workers did not answer store"
            if isinstance(server, ServerOnCluster | ServerOnHosts)
            else "1 of 2 workers"
        )
        with pytest.raises(LockstepError, match=late) as error:
            P.push(client, other, "stopped", 1)
        assert error.value.code is ErrorCode.INSTALL_FAILED
        assert time.monotonic() - started < PUSH_TIMEOUT_S + 15
        assert client.run("stopped").version == WeightVersion(run_id="stopped", fence=0, step=0)
        if engines == 2:  # the first engine does not need the second one's worker
            assert max(_gaps(client, served, engines=1)) < FP32
    finally:
        os.kill(worker, signal.SIGCONT)
    assert max(_gaps(client, served, engines)) < FP32
    P.push(client, other, "stopped", 2)
    assert max(_gaps(client, other, engines)) < FP32


def test_a_server_that_is_killed_leaves_no_process(server: ServerProcess) -> None:
    """The last test of a layout."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    if isinstance(server, ServerOnCluster):
        processes += [server.worker(0), server.worker(1)]
    if isinstance(server, ServerOnHosts):
        processes += server.processes_of_hosts()[1]
    assert len(processes) >= 2
    server.process.kill()
    assert psutil.wait_procs(processes, timeout=120.0)[1] == []
    if isinstance(server, ServerOnHosts):
        assert server.follower.wait(30.0) == 1
        assert "has ended, and this host's workers with it" in server.follower_log.read_text().splitlines()[-1]


def _last_worker(server: ServerProcess) -> int:
    """Return the process id of a worker: rank 1 of the tensor-parallel group, or the second engine's."""
    if isinstance(server, ServerOnCluster | ServerOnHosts):
        return server.worker(1).pid
    processes = [psutil.Process(pid) for pid in server.engine_processes()]
    workers = [process for process in processes if "Worker" in process.name()]
    assert len(workers) == 2
    (last,) = (process for process in workers if "TP1" in process.name() or "DP1" in process.parent().name())
    return last.pid
