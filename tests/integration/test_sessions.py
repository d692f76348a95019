"""Sessions of agents over the SDKs that agents use: what is recorded is what the engine was asked and answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from anthropic import Anthropic
from openai import APIStatusError, BadRequestError, OpenAI
from transformers import AutoTokenizer

from learner.servers.client import RolloutClient
from shared.rollouts import ScoreRequest
from shared.sessions import SessionOpened, SessionRecord, Trajectory
from shared.weights import WeightVersion
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP, ServerProcess
from tests.integration.support.waiting import until

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
        client.delete_run(RUN, P.LEASE)


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


def _complete(texts: list[str]) -> list[str]:
    """Return the texts without a last character that is not complete, which vLLM keeps back."""
    return [text.rstrip("\ufffd") for text in texts]


def _check_logprobs(client: RolloutClient, trajectory: Trajectory, version: WeightVersion) -> None:
    request = ScoreRequest(sequences=[trajectory.token_ids], policy=version)
    scored = client.score(request).logprobs[0]
    positions = [position for start, end in trajectory.sampled for position in range(start, end)]
    own = torch.tensor([scored[position - 1] for position in positions])
    assert (torch.tensor(trajectory.logprobs) - own).abs().max() < P.FP32
    assert [(span.start, span.end, span.version) for span in trajectory.spans] == [(0, len(positions), version)]


def _tokens(model: Path) -> dict[str, int]:
    """Return plain one-character tokens of the model."""
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    return {text: token for text, token in vocabulary.items() if len(text) == 1 and text.isascii() and text.isalpha()}


def test_turns_are_one_trajectory(client: RolloutClient, pushed: WeightVersion, model: Path) -> None:
    """The second turn is streamed, the third with logprobs; the model's name and the temperature are the agent's."""
    letter = _tokens(model)["z"]  # no longer token begins with two of them
    session = _open(client, sampling={"allowed_token_ids": [letter], "max_tokens": 9})
    agent = _openai(client, session).chat.completions
    messages: list[Any] = [ASK]
    first = agent.create(model="gpt-4o", messages=messages, max_tokens=12, temperature=0.1).choices[0]
    assert first.logprobs is None
    assert first.finish_reason == "length"
    assert first.message.content == "z" * 9
    messages += [{"role": "assistant", "content": first.message.content}, ASK]
    streamed = agent.create(model="gpt-4o", messages=messages, max_tokens=4, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == "z" * 4
    messages += [{"role": "assistant", "content": text}, ASK]
    third = agent.create(model="gpt-4o", messages=messages, logprobs=True, top_logprobs=2).choices[0]
    record = _record(client, session)
    assert (record.calls, record.running, record.cut, record.repaired) == (3, 0, 0, 0)
    (trajectory,) = record.trajectories
    assert trajectory.calls == [0, 1, 2]
    assert _sampled(trajectory) == [[letter] * 9, [letter] * 4, [letter] * 9]
    assert third.logprobs is not None
    assert third.logprobs.content is not None
    assert [each.logprob for each in third.logprobs.content] == trajectory.logprobs[-9:]


def test_what_is_recorded_is_what_the_policy_says(
    client: RolloutClient, session: SessionOpened, pushed: WeightVersion, model: Path
) -> None:
    """Chat, n = 2, streams, plain completions and Responses; logprobs as a pass over the trajectories gives them."""
    agent, tokenizer = _openai(client, session), AutoTokenizer.from_pretrained(model)
    both = agent.chat.completions.create(model="any", messages=[ASK], max_tokens=12, n=2, temperature=0.2)
    streams = agent.chat.completions.create(model="any", messages=[ASK], max_tokens=12, n=2, stream=True)
    deltas = ["", ""]
    for chunk in streams:
        deltas[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    plain = agent.completions.create(model="any", prompt="the quick", max_tokens=5).choices[0].text
    response = agent.responses.create(model="any", input="the quick", max_output_tokens=5)
    trajectories = _record(client, session).trajectories
    assert [each.calls for each in trajectories] == [[0], [0], [1], [1], [2], [3]]
    texts = [tokenizer.decode(_sampled(each)[0], skip_special_tokens=True) for each in trajectories]
    answered = [*(choice.message.content or "" for choice in both.choices), *deltas, plain, response.output_text]
    assert _complete(texts) == _complete(answered)
    for trajectory in trajectories:
        _check_logprobs(client, trajectory, pushed)


def test_the_kept_mass_is_that_of_the_policy(client: RolloutClient, pushed: WeightVersion, model: Path) -> None:
    session = _open(client, sampling={"top_k": 5, "max_tokens": None})
    agent = _openai(client, session).chat.completions
    agent.create(model="any", messages=[ASK], max_tokens=16, logprobs=True, top_logprobs=4, stream=False)
    (trajectory,) = _record(client, session).trajectories
    policy = P.make_policy(model)
    P.randomize(policy, seed=3)
    ((start, end),) = trajectory.sampled
    expected = P.top_k_mass(policy, trajectory.token_ids, 5, 1.0)[start - 1 : end - 1]
    assert trajectory.log_kept_mass is not None
    assert (torch.tensor(trajectory.log_kept_mass) - expected).abs().max() < P.FP32


def test_text_that_is_rendered_again_goes_on_with_what_was_sampled(
    client: RolloutClient, pushed: WeightVersion, model: Path
) -> None:
    """Letters are not the tokens that a tokenizer makes of their text. Other text is a fork."""
    tokenizer, letters = AutoTokenizer.from_pretrained(model), _tokens(model)
    allowed = [*(letters[letter] for letter in "the"), tokenizer.eos_token_id]
    session = _open(client, sampling={"allowed_token_ids": allowed, "max_tokens": 40})
    agent = _openai(client, session).chat.completions
    form = {"structured_outputs": {"regex": "(the){4}"}}
    first = agent.create(model="any", messages=[ASK], extra_body=form).choices[0].message.content or ""
    assert len(tokenizer(first)["input_ids"]) < len(first) == 12
    history: list[Any] = [ASK, {"role": "assistant", "content": first}, ASK]
    agent.create(model="any", messages=history, extra_body=form)
    record = _record(client, session)
    assert record.repaired == 1
    (trajectory,) = record.trajectories
    assert _sampled(trajectory) == 2 * [[*(letters[letter] for letter in first), tokenizer.eos_token_id]]
    history[1] = {"role": "assistant", "content": first[:-1]}
    agent.create(model="any", messages=history, max_tokens=3)
    assert [each.calls for each in _record(client, session).trajectories] == [[0, 1], [2]]


def test_tools_and_formats_are_the_clients(client: RolloutClient, session: SessionOpened) -> None:
    agent = _openai(client, session).chat.completions
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {**schema, "additionalProperties": False}},
    }
    answer = agent.create(model="any", messages=[ASK], max_tokens=200, response_format=form).choices[0]
    assert set(json.loads(answer.message.content or "")) == {"a"}
    called: list[Any] = [
        ASK,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
            "content": "",
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    agent.create(model="any", messages=called, tools=[TOOL], tool_choice="none", max_tokens=3, stop=["e"])
    assert _record(client, session).calls == 2


def test_a_tool_is_called(client: RolloutClient, session: SessionOpened, model: Path) -> None:
    """What was sampled is text; the client has a call of it, and answers in its own words: the history is a fork."""
    said = '<tool_call>\n{"name": "add", "arguments": {"a": true}}\n</tool_call>'
    agent, form = _openai(client, session).chat.completions, {"structured_outputs": {"choice": [said]}}
    first = agent.create(model="any", messages=[ASK], tools=[TOOL], extra_body=form).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": True})
    answered: list[Any] = [ASK, first.message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    agent.create(model="any", messages=answered, tools=[TOOL], max_tokens=3)
    called, after = _record(client, session).trajectories
    ((tokens,), tokenizer) = _sampled(called), AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == said
    assert (called.calls, after.calls) == ([0], [1])


def test_a_call_with_half_a_character_is_answered(client: RolloutClient, session: SessionOpened) -> None:
    said = '<tool_call>\n{"name": "add", "arguments": {"a": "\\ud83d"}}\n</tool_call>'
    sdk, form = _openai(client, session), {"structured_outputs": {"choice": [said]}}
    chosen = sdk.chat.completions.create(model="any", messages=[ASK], tools=[TOOL], extra_body=form).choices[0]
    (call,) = chosen.message.tool_calls or ()
    tool: Any = {"type": "function", **TOOL["function"]}
    (item,) = sdk.responses.create(model="any", input="7", tools=[tool], extra_body=form).output
    for function in (call.function, item):
        assert function.arguments == '{"a": "\\ud83d"}'


def test_anthropic(client: RolloutClient, session: SessionOpened, model: Path) -> None:
    tokenizer, options = AutoTokenizer.from_pretrained(model), {"api_key": session.token, "max_retries": 0}
    below = Anthropic(base_url=client.url + session.path.removesuffix("/v1"), **options)
    ask: Any = {"model": "claude", "max_tokens": 8, "messages": [ASK]}
    answer = below.messages.create(**ask)
    assert below.messages.count_tokens(model="claude", messages=[ASK]).input_tokens == answer.usage.input_tokens
    by_token = Anthropic(base_url=client.url, **options)
    with by_token.messages.stream(**ask) as stream:
        streamed = "".join(stream.text_stream)
    texts = [
        tokenizer.decode(_sampled(each)[0], skip_special_tokens=True) for each in _record(client, session).trajectories
    ]
    answered = ["".join(block.text for block in answer.content if block.type == "text"), streamed]
    assert _complete(texts) == _complete(answered)


def test_a_stream_of_messages_that_the_end_of_its_session_ends(
    server: ServerProcess, client: RolloutClient, pushed: WeightVersion
) -> None:
    logged = server.log.read_text(errors="replace").count("Traceback")
    forever = _open(client, sampling={"ignore_eos": True, "max_tokens": None})
    ask: Any = {"model": "claude", "max_tokens": 900, "messages": [ASK], "stream": True}
    with HTTP.stream("POST", f"{client.url}{forever.path}/messages", json=ask) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: message_start"
        HTTP.delete(f"{client.url}/v1/sessions/{forever.session_id}")
        *_, event, data, _ = lines
    assert event == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].endswith("it has been deleted [session_ended]")
    assert server.log.read_text(errors="replace").count("Traceback") == logged


def test_a_token_opens_its_session_only(client: RolloutClient, session: SessionOpened) -> None:
    held = {"Authorization": f"Bearer {session.token}"}
    assert [each.id for each in _openai(client, session).models.list()] == ["policy"]
    ask = {"model": "any", "messages": [ASK], "max_tokens": 2}
    assert HTTP.post(f"{client.url}/v1/chat/completions", json=ask, headers=held).status_code == 200
    assert HTTP.post(f"{client.url}/v1/chat/completions", json=ask).status_code == 404, "it is no model of the server"
    assert HTTP.get(f"{client.url}/v1/state", headers=held).status_code == 403
    assert HTTP.get(f"{client.url}/v1/sessions/{session.session_id}", headers=held).status_code == 403
    assert _record(client, session).calls == 1


def test_errors_are_those_of_sessions(client: RolloutClient, pushed: WeightVersion) -> None:
    session = _open(client, max_calls=1, on_conflict="refuse")
    agent = _openai(client, session)
    for wrong in ({"temperature": 0.3}, {"extra_body": {"use_beam_search": True}}):
        with pytest.raises(BadRequestError, match=str(next(iter(wrong.get("extra_body", wrong))))):
            agent.chat.completions.create(model="any", messages=[ASK], **wrong)  # type: ignore[call-overload]
    with pytest.raises(BadRequestError, match="complete input"):
        agent.responses.create(model="any", input="a", previous_response_id="resp_1")
    agent.chat.completions.create(model="any", messages=[ASK], max_tokens=2)
    for stream in (False, True):
        with pytest.raises(APIStatusError, match="max_calls") as ended:
            agent.chat.completions.create(model="any", messages=[ASK], max_tokens=2, stream=stream)
        assert ended.value.status_code == 410
    assert _record(client, session).ended == "max_calls"
    assert HTTP.delete(f"{client.url}/v1/sessions/{session.session_id}").json()["calls"] == 1
    assert HTTP.get(f"{client.url}/v1/sessions/none").json()["error"]["code"] == "unknown_session"


def test_a_client_that_goes_away_frees_the_engine(
    server: ServerProcess, client: RolloutClient, pushed: WeightVersion
) -> None:
    ask = {"model": "any", "messages": [ASK], "stream": True}
    forever = _open(client, sampling={"ignore_eos": True, "max_tokens": None})
    with HTTP.stream("POST", f"{client.url}{forever.path}/chat/completions", json=ask) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert _record(client, forever).running == 1
    until(lambda: _record(client, forever).cut == 1)
    until(lambda: server.metric("lockstep_sequences") == 0)
    assert _record(client, forever).trajectories == []
