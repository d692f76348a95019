"""`learner up --cluster` on three nodes of a Ray cluster, one of which dies and is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from learner.run_dir.checkpoint import last_checkpoint, load_state
from learner.run_dir.files import HISTORY_FILE, read_lines
from tests.integration.support.forked import FORKING, REPOSITORY
from tests.integration.support.up_on_cluster import LONG_S, Up, write_recipe
from tests.integration.support.waiting import until
from tests.support.ray_cluster import RayCluster, RayNode

TOKEN = "only-the-nodes-of-this-test-know-it"
BATCH = 8
OURS = ("rollout_server.cli", "learner.cli")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster({"PYTHONPATH": FORKING}) as found:
        found.add(2, gpus=2).wait_ready()
        for node in [found.add(1), found.add(1)]:
            node.wait_ready()
        yield found


@pytest.mark.timeout(1200)
def test_nothing_outlives_a_command_that_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    nodes = cluster.nodes
    with (tmp_path / "log").open("wb") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.support.stand_in", cluster.address],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    said = (tmp_path / "log").read_text
    try:
        names = ("server-1", "server-2", "learner")
        until(lambda: all(f"{name} is ready" in said() for name in names) or driver.poll() is not None, LONG_S)
        assert driver.poll() is None, said()
        until(lambda: "learner has GPUs" in said())
        assert "learner has GPUs 0,1" in said()
        started = [process for node in nodes for process in node.running("tests.integration.support.stand_in")]
    finally:
        driver.kill()
        driver.wait()
    assert len(started) == 3
    assert psutil.wait_procs(started, timeout=300.0)[1] == []


@pytest.mark.timeout(1200)
def test_rewards_and_agents_run_on_the_nodes(cluster: RayCluster, tmp_path: Path) -> None:
    nodes = cluster.nodes

    def workers() -> list[psutil.Process]:
        found = []
        for process in (process for node in nodes for process in node.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "WorkerActor" in (command := " ".join(process.cmdline())) or command == "sleep 3600":
                    found.append(process)
        return found

    with (tmp_path / "log").open("wb") as log:
        learner = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.support.cluster_rewards"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": nodes[0].address, "LOCKSTEP_TOKEN": TOKEN},
        )
    try:
        assert learner.stdout
        said = next((line for line in learner.stdout if line.startswith(b"[[")), b"")  # Ray says which worker died
        assert said, (tmp_path / "log").read_text()
        rewards, agents = json.loads(said)
        assert rewards == [[[1.0], None, [3.0], None], [[5.0]], [[0.0]]]
        assert agents == [[1.0, "worker", "it did not end within 2 s (agent_timeout_s)", 1.0]] * 2
        until(lambda: len(workers()) == 5)  # with what the agent that is a program has started
        started = workers()
    finally:
        learner.kill()
        learner.communicate()
    assert psutil.wait_procs(started, timeout=300.0)[1] == []


@pytest.mark.timeout(3600)
def test_a_node_dies_and_another_takes_its_place(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    nodes = cluster.nodes
    out, recipe, token = tmp_path / "run", tmp_path / "tiny.yaml", tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    write_recipe(recipe, model_name_or_path=str(model), token_file=str(token), proof_every=1)
    with closing(Up(cluster.address, recipe, out, tmp_path / "up.log", servers=3)) as up:
        up.until_it_says("server-1 is ready", "server-2 is ready", "server-3 is ready")
        up.until_steps(servers_up=3, more=1)
        started = [process for node in nodes for process in node.running(*OURS)]
        _check_that_the_token_is_nowhere(started, nodes)

        nodes[2].kill()
        up.until_it_says("its node is gone (127.0.1.3)")
        up.until_steps(servers_up=2, more=2)
        cluster.add(1).wait_ready()
        up.until_it_says("begins anew on 127.0.1.4", "is ready on 127.0.1.4")
        up.until_steps(servers_up=3, more=2)
        started += nodes[3].running(*OURS)

        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LONG_S) == 130, up.said()[-6000:]
    checkpoint = last_checkpoint(out)
    assert checkpoint, up.said()[-6000:]
    state = load_state(checkpoint)
    assert state.completions == BATCH * state.step, "every step had its whole batch"
    assert [row["step"] for row in read_lines(out / HISTORY_FILE)] == list(range(1, state.step + 1))
    assert psutil.wait_procs(started, timeout=120.0)[1] == []


def _check_that_the_token_is_nowhere(started: list[psutil.Process], nodes: list[RayNode]) -> None:
    """Check command lines, environments, and all that Ray has written."""
    assert len(started) >= 4, "three servers and the learner"
    for process in [*started, *(process for node in nodes for process in node.processes())]:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert TOKEN not in " ".join(process.cmdline())
            assert TOKEN not in str(process.environ())
    for node in nodes:
        for path in node.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert TOKEN.encode() not in path.read_bytes(), path
