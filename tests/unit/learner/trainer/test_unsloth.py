"""`vllm_sampling_params` as Unsloth's users write it, with vLLM's own class."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from learner.trainer.attach import attach
from learner.trainer.checks import check_grpo
from learner.trainer.sampling import sampling_params
from learner.trainer.unsloth import with_vllm_params
from shared.errors import LockstepError

#: Of Unsloth's GRPO notebooks.
NOTEBOOK = {
    "min_p": 0.1,
    "top_p": 1.0,
    "top_k": -1,
    "seed": 3407,
    "stop": ["<|im_end|>"],
    "include_stop_str_in_output": True,
}
AS_ASKED = {"min_p": 0.1, "top_k": -1, "seed": 3407, "stop": ["<|im_end|>"], "include_stop_str_in_output": True}


@pytest.mark.parametrize("given", [NOTEBOOK, SamplingParams(**NOTEBOOK)], ids=["dict", "object"])
def test_what_notebooks_write(grpo, given):
    args = grpo(max_completion_length=33, temperature=0.7)
    asked = sampling_params(with_vllm_params(args, given), eos_token_ids=[2])
    expected = {**AS_ASKED, "max_tokens": 33, "temperature": 0.7, "stop_token_ids": [2]}
    assert asked.model_dump(exclude_defaults=True) == expected
    assert args.generation_kwargs is None, "the trainer's own arguments stay as they are"


def test_what_is_at_vllms_default_is_not_set(grpo):
    args = grpo(top_p=0.9, repetition_penalty=1.1)
    assert with_vllm_params(args, None) is args
    assert with_vllm_params(args, SamplingParams()) is args
    assert with_vllm_params(args, {"top_p": 1.0}).generation_kwargs == {"top_p": 1.0}
    noted = SamplingParams(top_p=1.0)
    noted._set_kwargs = {"top_p": 1.0}  # as Unsloth's vLLMSamplingParams does
    assert with_vllm_params(args, noted).generation_kwargs == {"top_p": 1.0}


def test_structured_outputs(grpo):
    args = grpo(vllm_importance_sampling_correction=False)
    changed = with_vllm_params(args, SamplingParams(structured_outputs=StructuredOutputsParams(regex="[0-9]+")))
    assert sampling_params(changed).structured_outputs.regex == "[0-9]+"
    with pytest.raises(LockstepError, match="importance"):
        check_grpo(with_vllm_params(grpo(), {"structured_outputs": {"choice": ["a", "b"]}}))
    tag = SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag="{}"))
    with pytest.raises(LockstepError, match="structural_tag"):
        sampling_params(with_vllm_params(args, tag))


def test_what_says_the_same_or_nothing_is_accepted(grpo):
    args = grpo(num_generations=4, generation_batch_size=8, generation_kwargs={"seed": 1}, temperature=0.5)
    same = {
        "n": 4,
        "temperature": 0.5,
        "max_tokens": args.max_completion_length,
        "logprobs": 0,
        "detokenize": False,
        "seed": 1,
        "stop": None,
        "skip_special_tokens": False,
    }
    assert with_vllm_params(args, same).generation_kwargs == {"seed": 1}
    assert with_vllm_params(args, {"n": 1}) is args


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 3}, "n=3 contradicts num_generations=8"),
        (SamplingParams(temperature=0.5), "temperature=0.5 contradicts temperature=1.0"),
        ({"max_tokens": 17}, "contradicts max_completion_length=512"),
        (SamplingParams(logprobs=5), "logprobs=5"),
        (SamplingParams(prompt_logprobs=1), "prompt_logprobs"),
        ({"extra_args": {"a": 1}}, "extra_args"),
        ({"stop": "x", "skip_special_tokens": False}, "stop_token_ids"),
        ({"seed": 2}, "generation_kwargs.seed=1"),
        (SimpleNamespace(min_p=0.1), "give a vllm.SamplingParams"),
    ],
)
def test_what_cannot_be_honoured(grpo, given, words):
    with pytest.raises(LockstepError, match=words):
        with_vllm_params(grpo(generation_kwargs={"seed": 1}), given)


def test_values_are_checked_by_the_schema_of_requests(grpo):
    with pytest.raises(LockstepError, match="min_p"):
        sampling_params(with_vllm_params(grpo(), {"min_p": 2.0}))
    with pytest.raises(LockstepError, match="there is no stop string"):
        sampling_params(with_vllm_params(grpo(), {"include_stop_str_in_output": True}))


def test_they_are_in_every_request(make_trainer, server, client):
    """Given to attach, or as the attribute of the arguments where Unsloth has it."""
    server.log_kept_mass = 0.0
    given = {"min_p": 0.1, "seed": 7, "stop": ["w1 w1"]}
    for as_attribute in (False, True):
        trainer = make_trainer(max_steps=1)
        if as_attribute:
            trainer.args.vllm_sampling_params = SamplingParams(**given)
            attach(trainer, client=client, run_id="r", takeover=True)
        else:
            attach(trainer, client=client, run_id="r", vllm_sampling_params=given)
        server.generated.clear()
        trainer.train()
        asked = server.generated[-1].sampling.model_dump()
        assert given.items() <= asked.items()
        assert asked["n"] == 4
