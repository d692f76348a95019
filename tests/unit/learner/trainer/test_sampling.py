"""Generation options of TRL: mapped, read by TRL, or refused by name."""

from __future__ import annotations

from dataclasses import fields

import pytest
from trl import GRPOConfig

from learner.rollouts.completions import policy_logprobs
from learner.trainer.sampling import MAPPED, REFUSED, USED_BY_TRL, refuse_unmapped, sampling_params
from shared.errors import LockstepError
from shared.rollouts import Completion
from shared.sampling import SamplingParams


def test_every_vllm_field_of_trl_is_known():
    known = MAPPED | USED_BY_TRL | set(REFUSED)
    found = {f.name for f in fields(GRPOConfig) if f.name.startswith("vllm_")}
    assert found <= known, "a new TRL option: map it or refuse it in learner/trainer/sampling.py"
    assert {n for n in known if n.startswith("vllm_")} <= found, "TRL dropped an option"


def test_maps_all_generation_options(grpo):
    params = sampling_params(
        grpo(
            temperature=0.7,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.1,
            max_completion_length=33,
            vllm_structured_outputs_regex="[0-9]+",
            generation_kwargs={"stop": ["\n"], "seed": 3, "presence_penalty": 0.5, "top_p": 0.8},
        ),
        eos_token_ids=[2, 7],
    )
    assert params.model_dump(exclude_defaults=True) == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "max_tokens": 33,
        "structured_outputs": {"regex": "[0-9]+"},
        "stop": ["\n"],
        "seed": 3,
        "presence_penalty": 0.5,
        "stop_token_ids": [2, 7],
    }


def test_no_stop_tokens_may_be_none(grpo):
    assert sampling_params(grpo(generation_kwargs={"stop_token_ids": None}), [2]).stop_token_ids == [2]


def test_ignore_eos_is_not_undone_by_our_stop_tokens(grpo):
    assert sampling_params(grpo(generation_kwargs={"ignore_eos": True}), [2]).stop_token_ids == []


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"n": 3}, "num_generations"),
        ({"num_beams": 4}, "num_beams"),
        ({"temprature": 1.0}, "temprature"),
        ({"logprobs": 5}, "logprobs"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ],
)
def test_unknown_generation_kwargs_are_refused_by_name(grpo, kwargs, word):
    with pytest.raises(LockstepError, match=word):
        sampling_params(grpo(generation_kwargs=kwargs))


def test_two_structures_contradict(grpo):
    args = grpo(vllm_structured_outputs_regex="a", generation_kwargs={"structured_outputs": {"choice": ["a"]}})
    with pytest.raises(LockstepError, match="one of them"):
        sampling_params(args)


_OTHER_VALUES = {
    "vllm_mode": "banana",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_server_base_url": "http://x",
    "vllm_server_host": "h",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_group_port": 1,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 10,
    "vllm_tensor_parallel_size": 2,
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "transformers_continuous_batching_config": {"max_memory_percent": 0.1},
    "cache_implementation": "static",
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_options_without_effect_are_refused_by_name(grpo, name):
    refuse_unmapped(grpo())
    args = grpo()
    setattr(args, name, _OTHER_VALUES[name])
    with pytest.raises(LockstepError, match=name):
        refuse_unmapped(args)


def test_what_trl_users_write_anyway_is_accepted(grpo):
    refuse_unmapped(grpo(vllm_mode="server", vllm_importance_sampling_mode="token_truncate"))


def test_logprobs_before_truncation():
    completion = Completion(token_ids=[5, 6], logprobs=[-0.5, 0.0], finish_reason="length", spans=[])
    assert policy_logprobs(completion, SamplingParams(temperature=0.7)) == [-0.5, 0.0]
    assert policy_logprobs(completion, SamplingParams(temperature=0.0, top_p=0.5)) == [-0.5, 0.0]
    for cut in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        with pytest.raises(LockstepError, match="top_p=1"):
            policy_logprobs(completion, SamplingParams(**cut))
        known = completion.model_copy(update={"log_kept_mass": [-0.25, -1.0]})
        assert policy_logprobs(known, SamplingParams(**cut)) == [-0.75, -1.0]
    assert policy_logprobs(known, SamplingParams()) == [-0.75, -1.0], "of a model that never draws some tokens"
