"""Scores of a policy through an agent."""

from __future__ import annotations

import threading

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from learner.agents.calls import FunctionAgent
from learner.agents.episodes import AgentError
from learner.evaluation.agents import evaluate_agent
from learner.rewards.calls import RewardError
from learner.servers.client import RolloutClient
from learner.tasks import Task
from shared.sampling import SamplingParams
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


def test_an_agent_that_returns_no_reward_is_refused(server, client):
    def agent(session, row):
        ask(server, session, [5, 6])

    with pytest.raises(AgentError, match="returned no reward"):
        evaluate_agent(client, make_task(), FunctionAgent(agent), policy="base", sampling=GREEDY)
    with pytest.raises(RewardError, match="no completion has a reward"):
        evaluate_agent(client, make_task(), FunctionAgent(lambda *_: 1.0), policy="base", sampling=GREEDY)
