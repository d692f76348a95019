"""Agents on a Ray cluster keep the contract of those on this machine; over a Ray that only pretends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from learner.agents import on_cluster
from learner.agents.agent_session import AgentSession
from learner.agents.calls import AgentFailed, FunctionAgent, ProgramAgent
from learner.agents.on_cluster import AgentOnCluster, agents_on_cluster
from learner.cluster import workers
from shared.errors import InvalidRequest, NotReady
from tests.support.fake_ray import ActorDiedError, FakeRay, GetTimeoutError
from tests.unit.learner.agents.test_calls import ROW, make_session

SEEN: list[Any] = []


def answers(session: AgentSession, row: Any) -> float:
    SEEN.append((session, row, os.environ.get("LOCKSTEP_TOKEN"), threading.current_thread()))
    return float(row["answer"])


async def answers_later(session: AgentSession, row: Any) -> None:
    SEEN.append(session)


def breaks(session: AgentSession, row: Any) -> float:
    raise KeyError("the tool's own")


def returns_text(session: AgentSession, row: Any) -> Any:
    return "good"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A cluster on which an episode hangs, or ends its process, where its row says so."""
    fake = FakeRay(**{"10_0_0_1": {"CPU": 2.0, "sandbox": 1.0}})

    def before(actor: Any, method: str, args: Any) -> None:
        if method == "call":
            _, row = cloudpickle.loads(args[1])
            if row.get("ends") == "never":
                raise GetTimeoutError
            if row.get("ends") == "its process":
                raise ActorDiedError("The actor died\nconnection error code 2. End of file")

    fake.before = before
    monkeypatch.setattr(workers, "connect", lambda: fake)
    monkeypatch.setattr(workers, "_LOOK_S", 0.01)
    monkeypatch.setattr(workers, "_RETRY_S", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "of the test")
    monkeypatch.setenv("LOCKSTEP_TOKEN", "of the shell that Ray was started in")
    SEEN.clear()
    return fake


@pytest.fixture
def make_agent(ray: FakeRay) -> Iterator[Callable[..., AgentOnCluster]]:
    made: list[AgentOnCluster] = []

    def make(agent: Any = answers, count: int = 1, ca_file: str | None = None, **needs: float) -> AgentOnCluster:
        agent = ProgramAgent(agent) if isinstance(agent, str) else FunctionAgent(agent)
        made.append(agents_on_cluster(agent, needs, ca_file)(count))
        return made[-1]

    yield make
    for agent in made:
        agent.close()


def test_an_episode_runs_in_an_actor(ray: FakeRay, make_agent: Callable[..., AgentOnCluster]) -> None:
    agent = make_agent(count=2)
    assert (agent.is_async, agent.takes_reward) == (False, False)
    assert agent.run(make_session(), ROW) == 2.0
    [(session, row, token, _)] = SEEN
    assert (session, row) == (make_session(), ROW)
    assert token is None, "the server's token opens more than the session"
    assert {options["num_cpus"] for options in ray.options} == {0.25}


def test_coroutines_and_programs_run_there_as_here(make_agent: Callable[..., AgentOnCluster]) -> None:
    agent = make_agent(answers_later)
    assert agent.is_async
    assert agent.run(make_session(), ROW) is None
    agent = make_agent('[ -z "$LOCKSTEP_TOKEN" ] && echo 0.5 > "$LOCKSTEP_REWARD_FILE"')
    assert agent.takes_reward
    assert agent.run(make_session(), ROW) == 0.5


@pytest.mark.parametrize(
    ("agent", "match", "details"),
    [
        (breaks, 'KeyError: "the tool\'s own"', "in breaks"),
        (returns_text, "it returned 'good', not a reward", ""),
        ("echo lost >&2; exit 3", "exit code 3", "lost\n"),
    ],
)
def test_failures_come_back_as_they_are_here(
    make_agent: Callable[..., AgentOnCluster], agent: Any, match: str, details: str
) -> None:
    here = ProgramAgent(agent) if isinstance(agent, str) else FunctionAgent(agent)
    with pytest.raises(AgentFailed, match=match) as caught:
        make_agent(agent).run(make_session(), ROW)
    with pytest.raises(AgentFailed) as expected:
        here.run(make_session(), ROW)
    assert (str(caught.value), caught.value.kind) == (str(expected.value), expected.value.kind)
    assert details in caught.value.details


@pytest.mark.parametrize(
    ("ends", "match", "kind"),
    [
        ("never", r"^it did not end within 3 s \(agent_timeout_s\)$", None),
        ("its process", "^its process on the Ray cluster ended, .*: connection error code 2. End of file$", "worker"),
    ],
)
def test_an_actor_that_hangs_or_dies_costs_one_episode(
    ray: FakeRay, make_agent: Callable[..., AgentOnCluster], ends: str, match: str, kind: str | None
) -> None:
    agent = make_agent()
    for _ in range(3):
        with pytest.raises(AgentFailed, match=match) as caught:
            agent.run(make_session(timeout_s=3.0), {**ROW, "ends": ends})
        assert kind in (None, caught.value.kind)
    assert agent.run(make_session(), ROW) == 2.0
    assert ray.killed == ray.workers[:3], "whatever it still does there has ended"


@pytest.mark.parametrize(("agent", "beyond_s"), [(answers, 1.0), (answers_later, 6.0), ("true", 16.0)])
def test_what_can_be_ended_on_the_node_is_ended_there(
    ray: FakeRay, make_agent: Callable[..., AgentOnCluster], agent: Any, beyond_s: float
) -> None:
    limits, get = [], ray.get

    def get_and_keep(reference: Any, timeout: float | None = None) -> Any:
        limits.append(timeout)
        return get(reference, timeout)

    ray.get = get_and_keep  # type: ignore[method-assign]
    make_agent(agent).run(make_session(timeout_s=60.0), ROW)
    assert limits[-1] == 60.0 + beyond_s


@pytest.mark.parametrize("agent", [answers, answers_later])
def test_a_function_there_is_not_left_to_itself(make_agent: Callable[..., AgentOnCluster], agent: Any) -> None:
    """A coroutine that does not yield cannot be cancelled either."""
    make_agent(agent).run(make_session(), ROW)
    assert not on_cluster._here["agent"].is_limited, "its actor is ended"


def test_the_servers_ca_goes_there(
    make_agent: Callable[..., AgentOnCluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("of the learner")
    monkeypatch.setattr(on_cluster, "ssl_context", lambda file: None)
    agent = make_agent(ca_file=str(ca))
    ca.unlink()
    agent.run(make_session(ca_file=str(ca)), ROW)
    [(session, *_)] = SEEN
    assert session.ca_file != str(ca)
    assert Path(session.ca_file).read_text() == "of the learner"
    assert session.environment["SSL_CERT_FILE"] == session.ca_file


def test_a_program_runs_in_the_learners_folder(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make = agents_on_cluster(ProgramAgent("pwd > here"), {}, None)
    monkeypatch.chdir("/")
    agent = make(1)
    agent.run(make_session(), ROW)
    agent.close()
    assert (tmp_path / "here").read_text() == f"{tmp_path}\n"


def test_a_place_is_kept_until_the_episode_is_over(make_agent: Callable[..., AgentOnCluster]) -> None:
    agent, second = make_agent(), threading.Event()

    def run_second() -> None:
        with agent.place():
            second.set()

    with agent.place() as placed:
        waits = threading.Thread(target=run_second)
        waits.start()
        assert placed.run(make_session(), ROW) == 2.0
    waits.join(60)
    assert second.is_set()


def test_nothing_of_the_learners_is_sent(
    ray: FakeRay, make_agent: Callable[..., AgentOnCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_TOKEN", "only-the-learner-knows-it")
    sent: list[Any] = []
    ray.before = lambda *call: sent.append(call[2])
    make_agent().run(make_session(), ROW)
    assert len(sent) > 1
    assert b"only-the-learner-knows-it" not in cloudpickle.dumps([ray.stored, sent, ray.options])


def test_a_row_that_cannot_be_sent_fails_its_episode_only(make_agent: Callable[..., AgentOnCluster]) -> None:
    agent = make_agent()
    with pytest.raises(TypeError, match="cannot pickle"):
        agent.run(make_session(), {**ROW, "lock": threading.Lock()})
    assert agent.run(make_session(), ROW) == 2.0


def test_what_cannot_be_sent_is_refused(ray: FakeRay) -> None:
    lock = threading.Lock()
    with pytest.raises(InvalidRequest, match=r"^agent_backend ray: the agent cannot be sent .*cannot pickle .*lock"):
        agents_on_cluster(FunctionAgent(lambda session, row: lock.locked()), {}, None)
    with pytest.raises(InvalidRequest, match=r"^agent_backend ray: there is no agent"):
        agents_on_cluster(None, {}, None)
    assert not ray.workers


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"CPU": 3.0}, r"^agent_backend ray: an agent needs 3 CPUs, and no node .*10\.0\.0\.1 with 2 CPUs \["),
        ({"sandbox": 2.0}, "an agent needs 0.25 CPU and 2 sandbox, and no node"),
        ({"bundle": 1.0}, "^agent_resources: bundle is Ray's own"),
    ],
)
def test_what_no_node_has_is_refused(ray: FakeRay, needs: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        agents_on_cluster(FunctionAgent(answers), needs, None)


def test_an_agent_that_no_node_can_import_is_one_line(
    ray: FakeRay, make_agent: Callable[..., AgentOnCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*args: Any) -> None:
        raise ImportError("No module named 'my_agent'")

    monkeypatch.setattr(on_cluster, "_prepare", prepare)
    with pytest.raises(InvalidRequest, match=r"for an episode: 0 of 2 run .*No module named 'my_agent' \["):
        make_agent(count=2).run(make_session(), ROW)


def test_an_agent_that_was_closed_runs_nothing(ray: FakeRay, make_agent: Callable[..., AgentOnCluster]) -> None:
    agent = make_agent()
    agent.close()
    with pytest.raises(NotReady, match="were ended"):
        agent.run(make_session(), ROW)
