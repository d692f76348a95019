"""One run of an agent against a fake server: whatever goes wrong, its session is closed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.agents.calls import AgentFailed, FunctionAgent, ProgramAgent
from learner.agents.episodes import run_once
from learner.servers.client import RolloutClient
from shared.sessions import SessionRequest
from tests.support.fake_sessions import FakeSessions


@pytest.fixture
def server(model_dir, server_state) -> FakeSessions:
    return FakeSessions(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), server_state)


class Broken:
    """What Python cannot show."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class BrokenError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class NoFork(ProgramAgent):
    def run(self, session, row):
        raise BlockingIOError("fork: out of processes")


@pytest.mark.parametrize("limit", ["max_calls", "max_tokens"])
def test_an_agent_that_fails_at_a_limit_is_told_which(server, limit):
    def agent(session, row):
        server.open[session.session_id].record.ended = limit
        raise RuntimeError("410 session_ended")

    client, request = RolloutClient("http://fake", transport=server.transport), SessionRequest(policy="base")
    with pytest.raises(AgentFailed, match=rf"agent_{limit} {getattr(request, limit)}: raise it.*410 session_ended"):
        run_once(FunctionAgent(agent), client, request, {"prompt": "w1"}, timeout_s=60.0)


def raises(session, row):
    raise BrokenError


@pytest.mark.parametrize(
    ("agent", "match"),
    [
        (FunctionAgent(lambda session, row: 10**400), "not a reward"),
        (FunctionAgent(lambda session, row: 10**5000), "not a reward"),
        (FunctionAgent(lambda session, row: Broken()), "Broken.*not a reward"),
        (FunctionAgent(raises), "BrokenError"),
        (NoFork("true"), "BlockingIOError: fork"),
        (ProgramAgent('rm -r "$(dirname "$LOCKSTEP_ROW_FILE")"; echo gone >&2; exit 3'), "exit code 3"),
        (ProgramAgent('rm -r "$(dirname "$LOCKSTEP_ROW_FILE")"; sleep 1000'), "did not end within"),
    ],
)
def test_every_failure_is_the_agents_and_closes_its_session(server, agent, match):
    client = RolloutClient("http://fake", transport=server.transport)
    request = SessionRequest(policy="base")
    timeout_s = 1.0 if match == "did not end within" else 60.0
    with pytest.raises(AgentFailed, match=match) as caught:
        run_once(agent, client, request, {"prompt": "w1"}, timeout_s=timeout_s)
    assert caught.value.kind
    assert server.closed == ["s0"]
    assert not server.open
