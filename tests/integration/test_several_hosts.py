"""One engine over two nodes of a Ray cluster: who may connect to its workers, and what comes of a node that dies.

That pushes reach both workers is seen in `test_parallel`, on the layout `ray`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shared.bearer_tokens import TOKEN_VARIABLE
from tests.integration.conftest import FLAGS
from tests.integration.support.on_cluster import ServerOnCluster, running_on, two_nodes
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


def _addresses(process: psutil.Process, status: str) -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in process.net_connections("tcp") if c.status == status}


def _link(server: ServerOnCluster, worker: psutil.Process) -> tuple[str, int]:
    """Return the worker's end of the link between server and worker."""
    process = psutil.Process(server.process.pid)
    theirs = {tuple(c.raddr) for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}
    (found,) = theirs & _addresses(worker, psutil.CONN_ESTABLISHED)
    return found


@pytest.mark.timeout(900)
def test_a_node_that_dies_ends_the_server_and_it_says_which(cluster: RayCluster, server: ServerOnCluster) -> None:
    workers, links = [server.worker(0), server.worker(1)], []
    for worker, node in zip(workers, cluster.nodes, strict=True):
        host, port = _link(server, worker)
        assert host == node.host
        # The port was open for the server alone.
        assert (host, port) not in _addresses(worker, psutil.CONN_LISTEN)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5.0)
        links.append((host, port))
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    assert all(TOKEN_VARIABLE not in process.environ() for process in [*children, *workers])
    cluster.nodes[1].kill()
    until(lambda: server.process.poll() is not None, _LONG_S)
    assert server.process.returncode == 1, server.tail()
    host, port = links[1]
    assert f"the engine died: worker 1 of the engine ({host}:{port}) has ended" in server.tail()
    assert psutil.wait_procs([*workers, *children], timeout=_LONG_S)[1] == []
