"""One engine over two nodes of a Ray cluster: who loses one ends with that reason, and leaves nothing behind.

That pushes reach both workers is seen in `test_parallel`, on the layout `ray`.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from learner.servers.client import RolloutClient
from shared.bearer_tokens import TOKEN_VARIABLE
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.on_cluster import ServerOnCluster, running_on, two_nodes, vllm_processes
from tests.integration.support.waiting import until
from tests.support.ray_cluster import RayCluster

_TOKEN = "a-token-that-no-worker-needs"
_LONG_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with two_nodes() as found:
        yield found


@pytest.fixture
def server(
    cluster: RayCluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerOnCluster]:
    monkeypatch.setenv(TOKEN_VARIABLE, _TOKEN)
    with running_on(cluster, model, tmp_path, *FLAGS) as process:
        yield process


def _workers(cluster: RayCluster) -> list[psutil.Process]:
    return [process for node in cluster.nodes for process in vllm_processes(node)]


def _addresses(process: psutil.Process, status: str) -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in process.net_connections("tcp") if c.status == status}


def _link(server: ServerOnCluster, worker: psutil.Process) -> tuple[str, int]:
    """Return the worker's end of the link between server and worker."""
    process = psutil.Process(server.process.pid)
    theirs = {tuple(c.raddr) for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}
    (found,) = theirs & _addresses(worker, psutil.CONN_ESTABLISHED)
    return found


@pytest.mark.timeout(900)
def test_a_server_that_is_killed_leaves_no_worker(cluster: RayCluster, server: ServerOnCluster, model: Path) -> None:
    workers = _workers(cluster)
    assert len(workers) == 2
    for worker, node in zip((server.worker(0), server.worker(1)), cluster.nodes, strict=True):
        host, port = _link(server, worker)
        assert host == node.host
        # The port was open for the server alone.
        assert (host, port) not in _addresses(worker, psutil.CONN_LISTEN)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5.0)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    assert all(TOKEN_VARIABLE not in process.environ() for process in [*children, *workers])
    with RolloutClient(server.url, token=_TOKEN) as client:
        policy = P.make_policy(model)
        P.randomize(policy, seed=1)
        assert P.push(client, policy, "killed", 0).workers == 2
    server.process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs([*workers, *children], timeout=_LONG_S)[1] == []


@pytest.mark.timeout(900)
def test_a_node_that_dies_ends_the_server_and_it_says_which(cluster: RayCluster, server: ServerOnCluster) -> None:
    workers = _workers(cluster)
    host, port = _link(server, server.worker(1))
    cluster.nodes[1].kill()
    until(lambda: server.process.poll() is not None, _LONG_S)
    assert server.process.returncode == 1, server.tail()
    assert f"the engine died: worker 1 of the engine ({host}:{port}) has ended" in server.tail()
    assert psutil.wait_procs(workers, timeout=_LONG_S)[1] == []
