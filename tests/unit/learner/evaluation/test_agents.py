"""Scores of a policy through an agent."""

from __future__ import annotations

import threading

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import learner.evaluation.agents
from learner.agents.calls import FunctionAgent
from learner.agents.episodes import AgentError
from learner.evaluation.agents import evaluate_agent
from learner.rewards.calls import RewardError
from learner.servers.client import RolloutClient
from learner.tasks import Task
from shared.errors import Draining, NotReady, Overloaded, SessionEnded, Timeout, UnknownRun, UnknownSession
from shared.sampling import SamplingParams
from shared.weights import WeightVersion
from tests.support.fake_sessions import FakeSessions, ask

GREEDY = SamplingParams(max_tokens=4)


@pytest.fixture
def server(model_dir, server_state) -> FakeSessions:
    return FakeSessions(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), server_state)


@pytest.fixture
def client(server) -> RolloutClient:
    return RolloutClient("http://fake", transport=server.transport)


def make_task() -> Task:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}", "number": i} for i in range(8)])
    return Task(name="toy", train=rows, eval=rows, reward_funcs=[])


def test_the_reward_is_the_agents(server, client):
    def agent(session, row):
        answer = ask(server, session, [5, 6])
        ask(server, session, [5, 6, *answer, 7])
        return float(row["number"] % 2)

    sampling = GREEDY.model_copy(update={"n": 2})
    result = evaluate_agent(client, make_task(), FunctionAgent(agent), policy="base", sampling=sampling)
    assert result.reward == 0.5
    assert result.rewards == {"agent": 0.5}
    assert len(result.rows) == 16
    assert [row.question for row in result.rows] == [i for i in range(8) for _ in range(2)]
    assert result.versions == ["base"]
    assert all(row.completion.startswith("w2 w3 ") for row in result.rows), "the conversation"
    assert {request.policy for request in server.opened} == {"base"}
    assert {request.sampling.n for request in server.opened} == {1}
    assert not server.open


def test_an_episode_was_cut_off_where_its_last_call_was(server, client):
    def agent(session, row):
        answer = ask(server, session, [5, 6])
        ask(server, session, [7, 8])  # a helper, whose conversation began last
        ask(server, session, [5, 6, *answer, 7])
        return 1.0

    server.spoil = lambda t: t.model_copy(
        update={"finish_reasons": ["length" if 2 in t.calls else "stop"] * len(t.calls)}
    )
    result = evaluate_agent(client, make_task(), FunctionAgent(agent), policy="base", sampling=GREEDY)
    assert {row.finish_reason for row in result.rows} == {"length"}


def test_an_episode_that_fails_is_run_again_and_then_left_out(server, client):
    runs, lock = [], threading.Lock()

    def agent(session, row):
        with lock:
            runs.append(row["number"])
        if row["number"] == 3 or (row["number"] == 4 and runs.count(4) == 1):
            raise RuntimeError("broken")
        return float(len(ask(server, session, [5, 6])) > 0)

    result = evaluate_agent(client, make_task(), FunctionAgent(agent), policy="base", sampling=GREEDY)
    assert (runs.count(3), runs.count(4)) == (3, 2)
    assert (result.questions, result.unscored, result.reward) == (7, 1, 1.0)
    assert "broken" in result.rows[3].completion


@pytest.mark.parametrize(
    "kind",
    [NotReady, Timeout, Overloaded, Draining, UnknownRun, UnknownSession, SessionEnded],
    ids=lambda kind: kind.code,
)
def test_an_episode_that_is_lost_with_its_server_is_run_again(server, client, monkeypatch, kind):
    monkeypatch.setattr(learner.evaluation.agents, "_PAUSE_S", 0.0)
    lost, open_session = [], client.open_session

    def open_or_fail(request):
        if len(server.opened) > 4 and len(lost) < 5:
            lost.append(1)
            raise kind("later")
        return open_session(request)

    monkeypatch.setattr(client, "open_session", open_or_fail)
    agent = FunctionAgent(lambda session, row: float(len(ask(server, session, [5, 6])) > 0))
    result = evaluate_agent(client, make_task(), agent, policy="base", sampling=GREEDY, concurrency=1)
    assert len(lost) == 5, "more often than an agent may fail"
    assert (result.reward, result.unscored) == (1.0, 0)


def test_what_stays_lost_ends_it_with_the_servers_error(server, client, monkeypatch):
    agent = FunctionAgent(lambda session, row: server.open.clear() or 1.0)
    with pytest.raises(UnknownRun, match="has lost a session"):
        evaluate_agent(client, make_task(), agent, policy="base", sampling=GREEDY, patience_s=0.0)


def test_a_run_that_is_not_served_is_not_waited_for(server, client, monkeypatch):
    monkeypatch.setattr(client, "wait_ready", lambda timeout_s: pytest.fail("waits"))
    server.served["other"] = (WeightVersion(run_id="other", step=1), "")
    agent = FunctionAgent(lambda session, row: 1.0)
    version = WeightVersion(run_id="typo", step=1)
    with pytest.raises(UnknownRun):
        evaluate_agent(client, make_task(), agent, policy=version, run_id="typo", sampling=GREEDY, patience_s=60.0)


def test_sessions_of_the_newest_policy_hold_no_slot(server, client):
    version = WeightVersion(run_id="r", step=1)
    server.served["r"], server.deltas["r"] = (version, ""), {}
    agent = FunctionAgent(lambda session, row: float(len(ask(server, session, [5, 6])) > 0))
    result = evaluate_agent(client, make_task(), agent, run_id="r", sampling=GREEDY)
    assert result.versions == [str(version)]
    assert all(request.follow for request in server.opened)
    evaluate_agent(client, make_task(), agent, policy=version, run_id="r", sampling=GREEDY)
    assert not server.opened[-1].follow, "one version is asked for"


def test_an_agent_that_returns_no_reward_is_refused(server, client):
    def agent(session, row):
        ask(server, session, [5, 6])

    with pytest.raises(AgentError, match="returned no reward"):
        evaluate_agent(client, make_task(), FunctionAgent(agent), policy="base", sampling=GREEDY)
    with pytest.raises(RewardError, match="no completion has a reward"):
        evaluate_agent(client, make_task(), FunctionAgent(lambda *_: 1.0), policy="base", sampling=GREEDY)
