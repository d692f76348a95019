"""`learner up --cluster` with an engine, or the learner, over two nodes of Ray, one of which dies and is replaced.

That pushes reach both workers, and what one that is stopped does, is seen in `test_parallel`, on the layout `ray`.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from learner.run_dir.checkpoint import last_checkpoint, load_state
from shared.bearer_tokens import TOKEN_VARIABLE
from tests.integration.support.forked import FORKING
from tests.integration.support.on_cluster import NICENESS, vllm_processes
from tests.integration.support.server import ENVIRONMENT
from tests.integration.support.up_on_cluster import LONG_S, Up, write_recipe
from tests.integration.support.waiting import until
from tests.support.ray_cluster import RayCluster

_TOKEN = "a-token-that-no-worker-needs"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes: the learner and one worker fit on the first."""
    with RayCluster({**ENVIRONMENT, **NICENESS, "PYTHONPATH": FORKING}) as found:
        found.add(2).wait_ready()
        found.add(1).wait_ready()
        yield found


def _addresses(process: psutil.Process, status: str) -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in process.net_connections("tcp") if c.status == status}


def _link(server: psutil.Process, worker: psutil.Process) -> tuple[str, int]:
    """Return the worker's end of the link between server and worker."""
    theirs = {tuple(c.raddr) for c in server.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}
    (found,) = theirs & _addresses(worker, psutil.CONN_ESTABLISHED)
    return found


@pytest.mark.timeout(3600)
def test_a_node_of_a_server_dies_and_another_takes_its_place(
    cluster: RayCluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, _TOKEN)
    head, other = cluster.nodes
    spread = {"distributed-executor-backend": "ray", "tensor-parallel-size": 2}
    write_recipe(recipe := tmp_path / "tiny.yaml", model_name_or_path=str(model), proof_every=1, server=spread)
    with closing(Up(cluster.address, recipe, tmp_path / "run", tmp_path / "up.log")) as up:
        up.until_it_says("1 x rollout server on 2 x 1 CPU", "server-1 is ready")
        up.until_steps(servers_up=1, more=2)
        workers = [worker for node in (head, other) for worker in vllm_processes(node)]
        (server, *children) = (p for node in (head, other) for p in node.running("rollout_server.cli"))
        for worker, node in zip(workers, (head, other), strict=True):
            host, port = _link(server, worker)
            assert host == node.host
            # The port was open for the server alone.
            assert (host, port) not in _addresses(worker, psutil.CONN_LISTEN)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, port), timeout=5.0)
        started = [server, *children, *workers]
        assert all(_TOKEN not in str(process.environ()) for process in started)

        is_beside_it = server in other.processes()
        other.kill()
        if is_beside_it:
            up.until_it_says(f"server-1: its node is gone ({other.host})")
        else:
            up.until_it_says(f"worker 1 of the engine ({host}:{port}) has ended")
        cluster.add(1).wait_ready()
        up.until_it_says("server-1 is ready", times=2)
        up.until_steps(servers_up=1, more=2)
        started += [worker for node in cluster.nodes for worker in vllm_processes(node)]
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LONG_S) == 130, up.said()[-6000:]
    assert psutil.wait_procs(started, timeout=120.0)[1] == []


@pytest.mark.timeout(3600)
def test_a_node_of_the_learner_dies_and_its_ranks_go_on_from_what_was_saved(
    cluster: RayCluster, model: Path, tmp_path: Path
) -> None:
    """Each node has room for one of the learner's two commands; a server fits beside neither."""
    head, other = cluster.nodes[0], cluster.add(2)
    other.wait_ready()
    if len(cluster.running_nodes()) == 2:  # the test above has not been run
        cluster.add(1).wait_ready()
    on_two = {"learner_nodes": 2, "learner_cpus": 4}
    own = {"per_device_train_batch_size": 4, "proof_every": 1, "save_steps": 2}
    write_recipe(recipe := tmp_path / "tiny.yaml", model_name_or_path=str(model), **own)
    out = tmp_path / "run"
    with closing(Up(cluster.address, recipe, out, tmp_path / "up.log", **on_two)) as up:
        up.until_it_says("the learner on 2 x 2 CPUs, on 127.0.1.1 and on any other node", "server-1 is ready")
        until(lambda: last_checkpoint(out) is not None or up.process.poll() is not None, LONG_S)
        assert up.process.poll() is None, up.said()[-6000:]
        started = [process for node in (head, other) for process in node.running("learner.cli")]
        assert {len(node.running("learner.cli")) > 0 for node in (head, other)} == {True}
        other.kill()
        up.until_it_says(f"learner-2 on {other.host} is gone", "the learner goes on where there is room")
        assert saved_step(out) >= 2
        before = saved_step(out)
        cluster.add(2).wait_ready()
        until(lambda: saved_step(out) > before or up.process.poll() is not None, LONG_S)
        assert up.process.poll() is None, up.said()[-6000:]
        started += [process for node in cluster.nodes for process in node.running("learner.cli")]
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LONG_S) == 130, up.said()[-6000:]
    state = load_state(checkpoint := last_checkpoint(out))
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2, "two ranks"
    assert state.completions == 8 * state.step, "every step had its whole batch"
    assert psutil.wait_procs(started, timeout=120.0)[1] == []


def saved_step(out: Path) -> int:
    return load_state(last_checkpoint(out)).step
