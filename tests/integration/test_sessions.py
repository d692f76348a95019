"""Sessions of agents over the SDKs that agents use: what is recorded is what the engine was asked and answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from learner.servers.client import RolloutClient
from shared.rollouts import ScoreRequest
from shared.sessions import SessionOpened, SessionRecord, Trajectory
from shared.weights import WeightVersion
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP

RUN = "agents"
ASK = {"role": "user", "content": "What is 3 + 4?"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}}},
}


@pytest.fixture(scope="module")
def pushed(server: Any, model: Path) -> Iterator[WeightVersion]:
    policy = P.make_policy(model)
    P.randomize(policy, seed=3)
    with RolloutClient(server.url) as client:
        yield P.push(client, policy, RUN, step=0).version


@pytest.fixture
def session(client: RolloutClient, pushed: WeightVersion) -> Iterator[SessionOpened]:
    opened = _open(client)
    yield opened
    HTTP.delete(f"{client.url}/v1/sessions/{opened.session_id}")


def _open(client: RolloutClient, **fields: Any) -> SessionOpened:
    answer = HTTP.post(f"{client.url}/v1/sessions", json={"run_id": RUN, **fields})
    assert answer.status_code == 200, answer.text
    return SessionOpened.model_validate(answer.json())


def _record(client: RolloutClient, opened: SessionOpened) -> SessionRecord:
    return SessionRecord.model_validate(HTTP.get(f"{client.url}/v1/sessions/{opened.session_id}").json())


def _openai(client: RolloutClient, opened: SessionOpened) -> OpenAI:
    return OpenAI(
        base_url=client.url + opened.path,
        api_key=opened.token,
        max_retries=0,
        http_client=httpx.Client(verify=False, trust_env=False),
    )


def _sampled(trajectory: Trajectory) -> list[list[int]]:
    return [trajectory.token_ids[start:end] for start, end in trajectory.sampled]


def _check_logprobs(client: RolloutClient, trajectory: Trajectory, version: WeightVersion) -> None:
    request = ScoreRequest(sequences=[trajectory.token_ids], policy=version)
    scored = client.score(request).logprobs[0]
    positions = [position for start, end in trajectory.sampled for position in range(start, end)]
    own = torch.tensor([scored[position - 1] for position in positions])
    assert (torch.tensor(trajectory.logprobs) - own).abs().max() < P.FP32
    assert [(span.start, span.end, span.version) for span in trajectory.spans] == [(0, len(positions), version)]


def test_a_conversation_is_one_trajectory(
    client: RolloutClient, session: SessionOpened, pushed: WeightVersion, model: Path
) -> None:
    """Three turns, of which the second is streamed; the model's name is the agent's."""
    agent, tokenizer = _openai(client, session).chat.completions, AutoTokenizer.from_pretrained(model)
    messages: list[Any] = [ASK]
    first = agent.create(model="gpt-4o", messages=messages, max_tokens=12, temperature=0.1)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, ASK]
    assert first.choices[0].logprobs is None
    streamed = agent.create(model="gpt-4o", messages=messages, max_tokens=12, stream=True)
    chunks = [chunk.choices[0].delta.content or "" for chunk in streamed]
    messages += [{"role": "assistant", "content": "".join(chunks)}, ASK]
    third = agent.create(model="gpt-4o", messages=messages, max_tokens=12, logprobs=True, top_logprobs=2)
    record = _record(client, session)
    assert (record.calls, record.running, record.cut) == (3, 0, 0)
    texts = [first.choices[0].message.content, "".join(chunks), third.choices[0].message.content]
    found = [
        (index, text)
        for trajectory in record.trajectories
        for index, ids in zip(trajectory.calls, _sampled(trajectory), strict=True)
        for text in [tokenizer.decode(ids, skip_special_tokens=True)]
    ]
    assert sorted(found) == list(enumerate(texts))
    for trajectory in record.trajectories:
        _check_logprobs(client, trajectory, pushed)
    asked_logprobs = third.choices[0].logprobs.content
    last = next(each for each in record.trajectories if each.calls[-1] == 2)
    assert [each.logprob for each in asked_logprobs] == pytest.approx(last.logprobs[-len(asked_logprobs) :], abs=1e-4)
