"""A job on a cluster: what it asks for, what it says, and how it ends; over a Ray that only pretends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from learner.cluster.hosted import Command, Report
from learner.cluster.job import ClusterJob, RunningJob
from learner.cluster.learner_nodes import LEARNER
from learner.cluster.resources import Needs, nodes
from learner.utils.threads import start
from shared.errors import InvalidRequest
from shared.placement import PLACEMENT_VARIABLE
from tests.support.fake_ray import ActorDiedError, ActorUnavailableError, FakeRay

ONE = {"CPU": 1.0}
RUNS = Report("life", "10.0.0.1", starts=1)
READY = replace(RUNS, ready=True, url="http://10.0.0.1:8000")
FAILED = Report("life", "10.0.0.1", starts=1, ended=1, status=1, reason="no memory", pause_s=1.0)
DONE = Report("life", "10.0.0.1", starts=1, ended=1, status=0, over=True)


class Driver:
    """A job that runs on a thread."""

    def __init__(self, ray: FakeRay, **changes: Any) -> None:
        command = Command("module", (), again=True)
        job = ClusterJob("name", command, (2, 2), Needs(ONE), [replace(command, again=False)], Needs(ONE))
        self.said, self.shown = list[str](), list[tuple[str, str]]()
        self._ray = ray
        self.running = RunningJob(ray, replace(job, **changes), lambda *line: self.shown.append(line), self.said.append)
        self.outcome = start(self.running.run, "job")

    def member(self, name: str, life: int = 0) -> Any:
        self.until(lambda: len(self._ray.hosted.get(name, ())) > life)
        return self._ray.hosted[name][life]

    def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            if self.outcome.done():
                self.outcome.result()
            threading.Event().wait(0.005)

    def until_it_says(self, words: str) -> None:
        self.until(lambda: any(words in line for line in self.said))


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay(**{"10_0_0_1": {"CPU": 2.0, "node:10.0.0.1": 1.0}, "10_0_0_2": {"CPU": 2.0}})


@pytest.fixture
def driver(ray: FakeRay) -> Driver:
    return Driver(ray)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server_needs": Needs({"CPU": 1.0, "GPU": 2.0})}, "a server needs 2 GPUs and 1 CPU, and no node"),
        ({"learner_needs": Needs({"CPU": 3.0})}, "the learner needs 3 CPUs, and no node"),
        ({"server_needs": Needs(ONE, 2)}, "2 servers of 2 x 1 CPU and a learner of 1 CPU do not fit"),
        ({"server_needs": Needs({"CPU": 3.0}, 2)}, "a server's worker needs 3 CPUs, and no node"),
        ({"servers": (4, 4)}, "4 servers of 1 CPU and a learner of 1 CPU do not fit"),
        ({"server_needs": Needs({"CPU": 2.0})}, "2 servers of 2 CPUs and a learner of 1 CPU do not fit"),
    ],
)
def test_what_no_cluster_of_this_size_can_run_is_refused_before_anything_is_started(
    ray: FakeRay, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        Driver(ray, **changes).outcome.result()
    assert "10.0.0.1 with 2 CPUs, 10.0.0.2 with 2 CPUs" in refused.value.message
    assert not ray.groups


def test_all_are_placed_at_once_and_the_learners_end_is_the_jobs(ray: FakeRay, driver: Driver) -> None:
    driver.member(LEARNER).reports.put(replace(RUNS, lines=("one", "two"), seen=2))
    driver.member(LEARNER).reports.put(DONE)
    assert driver.outcome.result() == (0, "")
    assert ray.groups == [[ONE, ONE, ONE]]
    assert driver.shown == [(LEARNER, "one"), (LEARNER, "two")]
    assert driver.member("server-1").options["max_restarts"] == -1


def test_the_learner_stays_on_its_node(ray: FakeRay) -> None:
    driver = Driver(ray, home=nodes(ray)[0])
    driver.member(LEARNER).reports.put(DONE)
    driver.outcome.result()
    assert ray.groups[0][0] == {"CPU": 1.0, "node:10.0.0.1": 0.001}


def test_the_directory_is_on_the_learners_node_and_no_servers(ray: FakeRay) -> None:
    driver = Driver(ray, home=nodes(ray)[0])
    driver.member(LEARNER).reports.put(DONE)
    driver.outcome.result()
    assert ray.placed["directory:name"] == ("hard", "node-10.0.0.1")


def test_a_learner_that_fails_ends_the_job_with_its_reason(driver: Driver) -> None:
    driver.member(LEARNER).reports.put(replace(DONE, status=2, reason="there is no --wrong"))
    assert driver.outcome.result() == (2, "learner on 10.0.0.1 ended with status 2: there is no --wrong")


def test_servers_that_never_were_ready_end_the_job_after_three_attempts(driver: Driver) -> None:
    for name in ("server-1", "server-2"):
        for times in (1, 2, 3):
            driver.member(name).reports.put(replace(FAILED, ended=times))
    status, reason = driver.outcome.result()
    assert status == 1
    assert reason.endswith("on 10.0.0.1 ended with status 1: no memory")


def test_servers_with_wrong_options_end_the_job_at_once(driver: Driver) -> None:
    for name in ("server-1", "server-2"):
        driver.member(name).reports.put(replace(FAILED, status=2, reason="there is no --wrong"))
    status, reason = driver.outcome.result()
    assert status == 1
    assert "there is no --wrong" in reason


def test_a_server_that_was_ready_once_is_waited_for(driver: Driver) -> None:
    driver.member("server-1").reports.put(READY)
    driver.until_it_says("server-1 is ready on 10.0.0.1: http://10.0.0.1:8000")
    for times in range(1, 6):
        for name in ("server-1", "server-2"):
            driver.member(name).reports.put(replace(FAILED, ended=times))
    driver.until(lambda: sum("no memory; it is started again in 1 s" in line for line in driver.said) == 10)
    assert not driver.outcome.done()
    driver.member(LEARNER).reports.put(DONE)
    assert driver.outcome.result()[0] == 0


def test_a_server_whose_node_is_gone_begins_anew_elsewhere(driver: Driver) -> None:
    server = driver.member("server-1")
    for report in (
        READY,
        ActorUnavailableError(),
        ActorUnavailableError(),
        replace(READY, life="next", node="10.0.0.2"),
    ):
        server.reports.put(report)
    driver.until_it_says("begins anew on 10.0.0.2")
    driver.until_it_says("server-1 is ready on 10.0.0.2")
    assert sum("its node is gone (10.0.0.1), or" in line for line in driver.said) == 1
    driver.member(LEARNER).reports.put(DONE)
    driver.outcome.result()


def test_a_server_that_was_out_of_reach_is_heard_of_again(driver: Driver) -> None:
    for report in (READY, ActorUnavailableError(), READY):
        driver.member("server-1").reports.put(report)
    driver.until_it_says("server-1 is heard of again on 10.0.0.1")
    assert sum("server-1 is ready" in line for line in driver.said) == 1
    driver.member(LEARNER).reports.put(DONE)
    driver.outcome.result()


@pytest.mark.parametrize("saved", [True, False])
def test_a_learner_whose_node_is_gone_goes_on_where_something_was_saved(ray: FakeRay, saved: bool) -> None:
    driver = Driver(ray, can_resume=lambda: saved)
    driver.member(LEARNER).reports.put(RUNS)
    driver.member(LEARNER).reports.put(ActorDiedError("trace\nnode died"))
    if saved:
        driver.member(LEARNER, life=1).reports.put(DONE)
    assert driver.outcome.result() == ((0, "") if saved else (1, "learner on 10.0.0.1 is gone: node died"))


def test_actors_that_cannot_be_started_end_the_job_with_the_reason(driver: Driver) -> None:
    died = ActorDiedError("ray::HostedActor.__init__()\n  File x\nModuleNotFoundError: No module named 'learner'\n")
    for name in ("server-1", "server-2"):
        driver.member(name).reports.put(died)
    status, reason = driver.outcome.result()
    assert status == 1
    assert reason.endswith("cannot be started on the cluster: ModuleNotFoundError: No module named 'learner'")


def test_more_servers_begin_as_soon_as_there_is_room(ray: FakeRay) -> None:
    driver = Driver(ray, servers=(2, 3))
    driver.member("server-3").reports.put(READY)
    driver.until_it_says("server-3 is ready")
    assert ray.groups == [[ONE, ONE, ONE], [ONE]]
    driver.member(LEARNER).reports.put(DONE)
    driver.outcome.result()


def test_each_server_of_several_nodes_has_a_placement_group_that_its_engine_finds(ray: FakeRay) -> None:
    ray.has["10.0.0.3"] = {"CPU": 3.0}
    driver = Driver(ray, servers=(1, 2), server_needs=Needs(ONE, 3))
    for number in (1, 2):
        server = driver.member(f"server-{number}")
        assert server.command.environment == {PLACEMENT_VARIABLE: f"lockstep/name-{number}"}
    assert ray.reserved == [([ONE], "PACK", ""), ([ONE] * 3, "PACK", "name-1"), ([ONE] * 3, "PACK", "name-2")]
    driver.running.end(threading.Event())
    assert not ray.groups


def test_the_learner_ends_before_the_servers_and_nothing_stays_reserved(ray: FakeRay, driver: Driver) -> None:
    for name in (LEARNER, "server-2"):
        driver.member(name)
    driver.running.end(threading.Event())
    assert ray.ended == [LEARNER, "server-1", "server-2"]
    assert not ray.groups
    assert len(ray.killed) == 4, "three commands, and the directory"


def test_a_hurry_is_passed_on(ray: FakeRay, driver: Driver) -> None:
    hurry = threading.Event()
    hurry.set()
    learner = driver.member(LEARNER)
    driver.member("server-2")
    told: list[float | None] = []
    whole_end = learner.end
    learner.end = lambda patience_s=None: (told.append(patience_s), patience_s == 0.0 and whole_end())
    driver.running.end(hurry)
    assert told == [None, 0.0]
