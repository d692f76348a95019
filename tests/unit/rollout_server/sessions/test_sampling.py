"""Whose sampling a session's calls have, and what of it is recorded or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from rollout_server.generation.vllm_params import overridden
from rollout_server.vllm_compat import vision
from shared.errors import InvalidRequest
from shared.sampling import SamplingParams as TrainersSampling
from tests.support.tiny_model import make_tiny_tokenizer
from tests.unit.rollout_server.sessions.conversing import TOKENIZER, Served, record_of


def test_the_trainer_samples() -> None:
    trainer = TrainersSampling(
        temperature=0.7, top_p=0.9, max_tokens=20, min_tokens=8, stop_token_ids=[7], logit_bias={3: -5.0}
    )
    client = SamplingParams(
        temperature=0.0, top_k=5, max_tokens=6, n=1, stop=["x"], stop_token_ids=[9], seed=4, presence_penalty=1.0
    )
    params = overridden(client, trainer, "id", truncated=False)
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.9, 0)
    assert (params.max_tokens, params.min_tokens) == (6, 6)
    assert params.stop_token_ids == [9, 7]
    assert params.all_stop_token_ids == {9, 7}
    assert (params.stop, params.presence_penalty) == (["x"], 0.0)
    assert params.logit_bias == {3: -5.0}
    assert params.logprobs == 0
    assert overridden(SamplingParams(max_tokens=50, logprobs=3), trainer, "id", truncated=False).max_tokens == 20
    assert overridden(SamplingParams(max_tokens=50, logprobs=3), trainer, "id", truncated=False).logprobs == 3
    with pytest.raises(InvalidRequest, match="greedy"):
        overridden(SamplingParams(n=2), TrainersSampling(temperature=0.0), "id", truncated=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thinking_token_budget", 5),  # as made of Anthropic's `thinking`
        ("thinking_token_budget", 0),
        ("extra_args", {"a": 1}),
        ("watermarking", False),
        ("logprob_token_ids", [3]),
        ("trace_decode_token_ids", [3]),
    ],
)
def test_what_a_route_may_set_behind_the_trainers_back_is_left_out(name: str, value: Any) -> None:
    params = overridden(
        SamplingParams(**{name: value, "logprobs": 0}), TrainersSampling(max_tokens=None), "id", truncated=False
    )
    assert getattr(params, name) is None


async def test_a_seed_holds_within_its_session(served: Served) -> None:
    one, two = await served.open(), await served.open()
    for session in (one, one, two):
        for seed in (4, 5, 2**63 - 1, None):
            await served.call(session, [1], seed=seed)
    seeds = [asked.params.seed for asked in served.engine.asked]
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 7
    assert seeds[3::4] == [None] * 3
    assert max(seed or 0 for seed in seeds) < 2**62  # vLLM adds the choice's number


def test_a_clients_form_of_outputs_stays() -> None:
    asked = {
        "prompt_logprobs": 2,
        "detokenize": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "output_kind": RequestOutputKind.DELTA,
    }
    params = overridden(SamplingParams(**asked), TrainersSampling(max_tokens=None), "id", truncated=False)
    assert {name: getattr(params, name) for name in asked} == asked
    assert params.skip_reading_prefix_cache
    assert not params.flat_logprobs


@pytest.mark.parametrize(
    ("asked", "flat"), [({}, True), ({"logprobs": 3}, True), ({"logprobs": 0}, False), ({"prompt_logprobs": 0}, False)]
)
def test_logprobs_have_text_for_who_reads_it_and_the_ranks_of_what_was_sampled(
    asked: dict[str, int], flat: bool
) -> None:
    """Flat ones of sampled tokens alone have no text; beside others only flat ones keep a sampled token's rank."""
    assert (
        overridden(SamplingParams(**asked), TrainersSampling(max_tokens=None), "id", truncated=False).flat_logprobs
        is flat
    )


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
async def test_logprobs_of_prompts_are_refused_where_they_would_cost_the_kept_mass(
    served: Served, cut: dict[str, Any]
) -> None:
    session = await served.open(sampling={**cut, "max_tokens": None})
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        await served.call(session, [1], logprobs=5, prompt_logprobs=0)
    assert not served.engine.asked


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("asked", [None, 0])
async def test_the_client_gets_the_logprobs_that_it_asked_for(served: Served, kind: Any, asked: int | None) -> None:
    session = await served.open()
    outputs = await served.call(session, [1], output_kind=kind, logprobs=asked, n=2)
    given = [each.logprobs is not None for output in outputs for each in output.outputs]
    assert all(given) == any(given) == (asked is not None)
    assert len(record_of(session).trajectories) == 2


@pytest.mark.parametrize(("sampling", "sees"), [({"top_p": 0.9}, False), ({}, True)])
async def test_the_kept_mass_is_recorded_where_the_distribution_is_cut(
    served: Served, sampling: dict[str, Any], sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "check_text", lambda *_: None)  # of the fake engine's model
    served.proxy.media_tokens = [7] if sees else []
    session = await served.open(sampling={**sampling, "max_tokens": None})
    await served.call(session, [1])
    (trajectory,) = record_of(session).trajectories
    assert trajectory.log_kept_mass is not None
    assert len(trajectory.log_kept_mass) == len(trajectory.logprobs)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"previous_response_id": "resp_1"}, "complete input"),
        ({"background": True}, "background"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
async def test_what_cannot_be_recorded_is_refused(served: Served, document: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        (await served.open()).check_call(document)


async def test_other_sampling_is_refused_by_name_where_the_trainer_wants_that(served: Served) -> None:
    sampling = {"temperature": 0.5, "logit_bias": {"3": 1.0}, "max_tokens": None}
    session = await served.open(on_conflict="refuse", sampling=sampling)
    same = {"temperature": 0.5, "top_k": -1, "logit_bias": {"3": 1}, "max_tokens": 9, "n": 4, "presence_penalty": 0}
    session.check_call(json.loads(json.dumps(same)))
    for document in ({"temperature": 0}, {"top_k": 3}, {"logit_bias": {"4": 1}}, {"ignore_eos": True}):
        with pytest.raises(InvalidRequest, match=f"^{next(iter(document))}="):
            session.check_call(document)
        (await served.open()).check_call(document)


async def test_a_penalty_of_minus_one_is_one(served: Served) -> None:
    """Only of top_k it means nothing."""
    session = await served.open(on_conflict="refuse")
    session.check_call({"top_k": -1, "logit_bias": {}, "bad_words": []})
    for name in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(InvalidRequest, match=rf"^{name}=-1 .* asks for 0\.0"):
            session.check_call({name: -1})
        own = await served.open(on_conflict="refuse", sampling={name: -1})
        own.check_call({name: -1.0})
        with pytest.raises(InvalidRequest, match=rf"^{name}=0 .* asks for -1\.0"):
            own.check_call({name: 0})


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop_token_ids": [len(TOKENIZER)]},
        {"allowed_token_ids": [3, len(TOKENIZER)]},
        {"logit_bias": {str(len(TOKENIZER)): 1.0}},
        {"bad_words": [" "]},
    ],
)
async def test_sampling_that_every_call_would_be_refused_for(served: Served, sampling: dict[str, Any]) -> None:
    served.proxy.turn_tokenizer = tokenizer = make_tiny_tokenizer()
    tokenizer.max_token_id = len(tokenizer) - 1  # as vLLM's have it
    await served.open(sampling={"stop_token_ids": [3], "logit_bias": {"3": 1.0}, "bad_words": ["fox"]})
    with pytest.raises(InvalidRequest, match=f"^sampling.*{next(iter(sampling))}"):
        await served.open(sampling=sampling)


@pytest.mark.parametrize("token_id", [2**32, 2**70])
async def test_a_token_id_that_no_record_can_hold(served: Served, token_id: int) -> None:
    session = await served.open()
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        await served.call(session, [1, token_id])
