"""Chaos on a Ray cluster: what `learner up` says, what the learner records, and what a lost node must not stop."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from learner.servers.client import RolloutClient
from tests.chaos import nodes, recorder
from tests.chaos.faults import NODE_FAULTS, plan
from tests.chaos.on_cluster import Members, Recorded
from tests.chaos.recording import Pushes
from tests.chaos.world import NotInjectedError
from tests.unit.chaos.test_proxy import BLOB, MANIFEST, RECEIPT

READY = [
    "up      | server-1 is ready on 127.0.1.2: http://127.0.1.2:4001",
    "up      | server-2 is ready on 127.0.1.3: http://127.0.1.3:4002",
]
LOST = "up      | server-2: its node is gone (127.0.1.3), or out of reach; it begins anew where there is room"


def members(*lines: str) -> Members:
    found = Members()
    for line in [*READY, *lines]:
        found.take(line)
    return found


def test_servers_are_those_that_are_ready() -> None:
    assert members().up == {"server-1": "127.0.1.2", "server-2": "127.0.1.3"}
    assert members(LOST).up == {"server-1": "127.0.1.2"}
    ended = "up      | server-2 on 127.0.1.3 ended with status 1: no memory; it is started again in 1 s"
    assert members(ended).up == {"server-1": "127.0.1.2"}
    anew = "up      | server-2 begins anew on 127.0.1.4"
    assert members(LOST, anew).up == {"server-1": "127.0.1.2"}
    again = members(LOST, anew, "up      | server-2 is ready on 127.0.1.4: http://127.0.1.4:4003")
    assert again.up == {"server-1": "127.0.1.2", "server-2": "127.0.1.4"}
    assert again.urls == ["http://127.0.1.2:4001", "http://127.0.1.3:4002", "http://127.0.1.4:4003"]


def test_a_server_that_was_out_of_reach_is_ready_again() -> None:
    assert members(LOST, "up      | server-2 is heard of again on 127.0.1.3").up == members().up


def test_losses_of_the_learner_are_counted_once() -> None:
    gone = "up      | learner on 127.0.1.4 is gone: The node has died.; it goes on where there is room"
    found = members(
        "up      | learner: its node is gone (127.0.1.4), or out of reach", gone, "learner | server-1 is gone"
    )
    assert (found.learners_lost, found.up) == (1, members().up)


def test_the_learner_records_pushes_before_they_are_sent_and_receipts_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[list[tuple[int, int]]] = []

    def push(*_: Any, **__: Any) -> Any:
        stored.append(list(Pushes(tmp_path).stored()))
        return RECEIPT

    monkeypatch.setattr(recorder, "_push", push)
    monkeypatch.setattr(recorder, "_folder", tmp_path)
    recorded = Recorded(tmp_path, urls := ["http://a:1"])
    for url in ("http://b:2", "http://a:1"):
        recorder._recorded_push(SimpleNamespace(url=url), "run", [BLOB[:9], memoryview(BLOB[9:])], "lease")  # type: ignore[arg-type]
    version = (MANIFEST.version.fence, MANIFEST.version.step)
    assert stored == [[version], [version]]
    assert recorded.pushed()[version].read_bytes() == BLOB
    (receipt,) = recorded.receipts()
    assert (receipt["server"], receipt["epoch"], receipt["step"]) == (0, RECEIPT.epoch, MANIFEST.version.step)
    urls.append("http://b:2")
    assert [receipt["server"] for receipt in recorded.receipts()] == [1, 0]


def test_an_adapter_is_recorded_for_several_servers_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def store(_: int) -> None:
        pushes = Pushes(tmp_path)
        together.wait()
        pushes.store(BLOB)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store, range(8)))
    assert [path.suffix for path in (tmp_path / "pushes").iterdir()] == [".blob"]


def test_only_a_learner_of_the_suite_records() -> None:
    assert RolloutClient.push.__module__ == "learner.servers.client"
    program = "from tests.chaos import recorder as r; print(r.RolloutClient.push is r._recorded_push)"
    environment = {recorder.FOLDER_VARIABLE: "."}
    said = subprocess.check_output([sys.executable, "-c", program], env=environment, cwd=Path(__file__).parents[3])
    assert said == b"True\n"


def test_a_schedule_of_nodes_has_each_fault() -> None:
    chosen = plan(Random(1), 8, quick=False, missing=set(), faults=NODE_FAULTS)
    assert len(chosen) == 8
    assert set(chosen) == set(NODE_FAULTS)


class _Node(SimpleNamespace):
    """A node that runs what it is told, until it is killed."""

    def __init__(self, *modules: str) -> None:
        super().__init__(host="127.0.1.9", killed=False, modules=modules)

    def running(self, *modules: str) -> list[str]:
        return [] if self.killed else [module for module in self.modules if module in modules]

    def processes(self) -> list[Any]:
        return []

    def kill(self) -> None:
        self.killed = True

    def wait_ready(self) -> None: ...


class _World(SimpleNamespace):
    """A job with one node that may go; its parts say what is wrong."""

    def __init__(self, node: _Node, folder: Path, **changes: Any) -> None:
        self.violations: list[str] = []
        added: list[_Node] = []
        super().__init__(
            nodes=lambda: [node],
            cluster=SimpleNamespace(add=lambda cpus: added.append(_Node()), nodes=added),
            members=SimpleNamespace(learners_lost=0),
            resumed_from=None,
            output=folder,
            learner=SimpleNamespace(tail=lambda: "its log"),
            checker=SimpleNamespace(violated=lambda invariant, what: self.violations.append(what)),
            is_whole=lambda: True,
            until=lambda condition, within: True,
            progress=lambda since, within: 0.1,
            require_ended=lambda processes, when: None,
        )
        vars(self).update(changes)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes.time, "sleep", lambda seconds: None)


def _lose(world: _World, take_away: Callable[[Any], object] = _Node.kill) -> None:
    nodes._lose(world, Random(1), take_away)  # type: ignore[arg-type]


def test_a_node_of_a_server_is_lost_and_replaced(tmp_path: Path) -> None:
    world = _World(node := _Node("rollout_server.cli"), tmp_path)
    _lose(world)
    assert node.killed
    assert len(world.cluster.nodes) == 1
    assert world.violations == []


def test_a_training_that_stops_with_one_of_its_servers_is_a_violation(tmp_path: Path) -> None:
    world = _World(_Node("rollout_server.cli"), tmp_path, progress=lambda since, within: None)
    _lose(world)
    assert len(world.violations) == 1
    assert "no step without the server of 127.0.1.9" in world.violations[0]


def test_a_learner_may_be_lost_once_it_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World(node := _Node("learner.cli"), tmp_path, progress=lambda since, within: None)
    with pytest.raises(NotInjectedError, match="saved nothing"):
        _lose(world)
    assert not node.killed
    monkeypatch.setattr(nodes, "last_checkpoint", lambda folder: folder / "checkpoint-5")
    _lose(world)
    assert node.killed
    assert world.resumed_from == tmp_path / "checkpoint-5"
    assert world.violations == []


def test_a_server_that_does_not_come_back_is_a_violation(tmp_path: Path) -> None:
    world = _World(node := _Node("rollout_server.cli"), tmp_path, until=lambda condition, within: bool(condition()))
    world.is_whole = lambda: not node.killed
    _lose(world)
    assert [what.splitlines()[0] for what in world.violations] == ["no server on the new node:"]


def test_receipts_that_are_half_written_are_read_later(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, ["http://a:1"])
    line = json.dumps({"url": "http://a:1", "epoch": "e"}) + "\n"
    with (tmp_path / recorder.RECEIPTS).open("a") as stream:
        stream.write(line[:10])
        stream.flush()
        assert recorded.receipts() == []
        stream.write(line[10:])
    assert [receipt["epoch"] for receipt in recorded.receipts()] == ["e"]
