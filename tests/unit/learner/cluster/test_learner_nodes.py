"""A learner on several nodes: its commands begin, end and go on together; over a Ray that only pretends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from learner.cluster import learner_nodes
from learner.cluster.hosted import Command, Report, place
from learner.cluster.learner_nodes import FIRST_HOST, FIRST_PORT, LEARNER
from learner.cluster.resources import Needs
from tests.support.fake_ray import ActorDiedError, ActorUnavailableError, FakeRay
from tests.unit.learner.cluster.test_job import DONE, ONE, READY, RUNS, Driver

SECOND = f"{LEARNER}-2"
COMMANDS = [Command("module", (str(number), FIRST_HOST, FIRST_PORT)) for number in range(3)]
FIRST_RUNS = replace(RUNS, port=4321)
FAILED = Report("life", "10.0.0.2", starts=1, ended=1, status=3, reason="no memory", over=True)
TOLD = Report("life", "10.0.0.1", starts=1, ended=1, status=1, reason="SIGTERM", over=True)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_nodes, "_FAIL_S", 0.5)


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay(**{f"10_0_0_{number}": {"CPU": 2.0} for number in (1, 2, 3)})


@pytest.fixture
def begin(ray: FakeRay) -> Callable[..., Driver]:
    """Returns what starts a job whose learner is on two nodes, unless a test says otherwise, and runs on all."""

    def begin(nodes: int = 2, **changes: Any) -> Driver:
        driver = Driver(ray, learner=COMMANDS[:nodes], learner_needs=Needs(ONE, nodes), **changes)
        driver.member(LEARNER).reports.put(FIRST_RUNS)
        driver.member(f"{LEARNER}-{nodes}")
        return driver

    return begin


def test_the_others_begin_once_it_is_known_where_the_first_listens(ray: FakeRay) -> None:
    driver = Driver(ray, learner=COMMANDS, learner_needs=Needs(ONE, 3), servers=(1, 1))
    assert driver.member(LEARNER).command.arguments == ("0", place("host"), place("port"))
    driver.member("server-1").reports.put(READY)
    driver.until_it_says("server-1 is ready")
    assert SECOND not in ray.hosted
    driver.member(LEARNER).reports.put(FIRST_RUNS)
    for number in (2, 3):
        member = driver.member(f"{LEARNER}-{number}")
        assert member.command.arguments == (str(number - 1), "10.0.0.1", "4321")
        member.reports.put(DONE)
    driver.member(LEARNER).reports.put(DONE)
    assert driver.outcome.result() == (0, "")
    assert ray.groups == [[ONE] * 4]
    assert not ray.ended, "all ended by themselves"


def test_a_first_that_ends_before_the_others_began_ends_the_job(ray: FakeRay) -> None:
    driver = Driver(ray, learner=COMMANDS, learner_needs=Needs(ONE, 3), servers=(1, 1))
    driver.member(LEARNER).reports.put(replace(FAILED, node="10.0.0.1"))
    assert driver.outcome.result() == (3, "learner on 10.0.0.1 ended with status 3: no memory")
    assert SECOND not in ray.hosted


@pytest.mark.parametrize("failing", [LEARNER, SECOND])
def test_one_that_fails_takes_the_others_along_and_gives_the_reason(begin, ray: FakeRay, failing: str) -> None:
    driver = begin()
    driver.member(failing).reports.put(FAILED)
    assert driver.outcome.result() == (3, f"{failing} on 10.0.0.2 ended with status 3: no memory")
    assert ray.ended == [{LEARNER: SECOND, SECOND: LEARNER}[failing]]


def test_of_several_that_fail_each_says_why(begin, ray: FakeRay) -> None:
    driver = begin(nodes=3)
    for name in (LEARNER, SECOND):
        driver.member(name).reports.put(replace(FAILED, reason=f"{name} heard nothing"))
    status, reason = driver.outcome.result()
    assert status == 3
    assert f"{LEARNER} heard nothing" in reason
    assert f"{SECOND} heard nothing" in reason
    assert ray.ended == [f"{LEARNER}-3"]


def test_one_that_does_not_end_after_the_others_is_told_to(
    begin, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_nodes, "_TOGETHER_S", 0.0)
    driver = begin()
    driver.member(LEARNER).reports.put(DONE)
    driver.until(lambda: ray.ended == [SECOND])
    driver.member(SECOND).reports.put(TOLD)
    assert driver.outcome.result() == (0, ""), "what was trained is saved"


@pytest.mark.parametrize("lost", [LEARNER, SECOND])
def test_a_node_that_is_gone_lets_all_begin_anew(begin, ray: FakeRay, lost: str) -> None:
    driver = begin(can_resume=lambda: True)
    other = {LEARNER: SECOND, SECOND: LEARNER}[lost]
    driver.member(lost).reports.put(RUNS)
    driver.member(lost).end = lambda patience_s: None  # it hears nothing
    driver.member(other).reports.put(FAILED)  # it is noticed there first
    driver.member(lost).reports.put(ActorUnavailableError())
    driver.until_it_says(f"{lost}: its node is gone (10.0.0.1), or out of reach")
    ray.has_room.clear()
    driver.member(lost).reports.put(ActorDiedError("trace\nnode died"))
    driver.until_it_says("the learner goes on where there is room")
    driver.until(lambda: ray.waits)
    assert len(ray.hosted[LEARNER]) == 1, "it would wait for the others, for ten minutes"
    ray.has_room.set()
    driver.member(LEARNER, life=1).reports.put(replace(FIRST_RUNS, node="10.0.0.3", port=5))
    again = driver.member(SECOND, life=1)
    assert again.command.arguments == ("1", "10.0.0.3", "5")
    assert len(ray.killed) == 2, "an actor that has ended would keep its place"
    seen_first = f"{other} on 10.0.0.2 ended with status 3: no memory"
    driver.until_it_says(
        f"{lost} on 10.0.0.1 is gone: node died; {seen_first}; the learner goes on where there is room"
    )
    driver.member(other, life=0).reports.put(FAILED)  # said of the one of before, it counts no more
    for member in (driver.member(LEARNER, life=1), again):
        member.reports.put(DONE)
    assert driver.outcome.result() == (0, "")


def test_without_anything_saved_a_lost_node_ends_the_job(begin, ray: FakeRay) -> None:
    driver = begin()
    driver.member(SECOND).reports.put(RUNS)
    driver.member(SECOND).reports.put(ActorDiedError("trace\nnode died"))
    assert driver.outcome.result() == (1, "learner-2 on 10.0.0.1 is gone: node died")
    assert ray.ended == [LEARNER]


def test_one_that_has_no_place_yet_is_not_waited_for(begin, ray: FakeRay) -> None:
    driver = begin()
    driver.member(SECOND).end = lambda patience_s: None  # its actor has not begun
    driver.member(LEARNER).reports.put(FAILED)
    assert driver.outcome.result() == (3, "learner on 10.0.0.2 ended with status 3: no memory")
