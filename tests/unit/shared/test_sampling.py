from __future__ import annotations

import pytest
from pydantic import ValidationError

from shared.sampling import SamplingParams


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens=20"),
        ({"n": 4, "temperature": 0.0}, "n=4"),
        ({"temperature": 0.005}, "0.01"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [7], "stop_token_ids": [7, 8], "min_tokens": 1}, "no token could be sampled"),
        ({"logit_bias": {"7": float("nan")}}, "logit_bias"),
        ({"logit_bias": {"7": 1e37}, "temperature": 0.01}, "logit_bias"),
        ({"logit_bias": {"7": -1e300}}, "logit_bias"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "exactly one"),
        ({"structured_outputs": {"regexp": "a"}}, "regexp"),
        ({"logprobs": 5}, "logprobs"),
        ({"structured_outputs": {"regex": "a{1,100000}"}}, "too large to be compiled"),
        ({"n": 10**400}, "n"),
        ({"stop": ["x"] * 10**4}, "stop"),
        ({f"field{i}": 0 for i in range(10**4)}, "fields, of which most are unknown"),
    ],
)
def test_unknown_and_contradictory_fields_are_named(fields: dict, word: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        SamplingParams(**fields)
    assert word in str(refusal.value)


def test_stop_takes_one_string_or_none() -> None:
    assert SamplingParams(stop="END").stop == ["END"]
    assert SamplingParams(stop=None).stop == []


def test_structured_outputs_keep_vllms_name() -> None:
    params = SamplingParams.model_validate_json('{"structured_outputs": {"json": {"type": "object"}}}')
    assert params.model_dump(exclude_none=True)["structured_outputs"] == {"json": {"type": "object"}}
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params


def test_names_and_defaults_are_vllms() -> None:
    vllm_params = pytest.importorskip("vllm").SamplingParams
    theirs = vllm_params()
    for name, value in SamplingParams().model_dump().items():
        assert hasattr(theirs, name), f"vLLM has no {name}"
        assert getattr(theirs, name) in (value, None) or value == [], name
