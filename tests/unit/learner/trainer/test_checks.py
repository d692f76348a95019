"""Every refusal, each with a word on what to do instead."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PromptTuningConfig
from transformers import LlavaConfig, Qwen3Config

from learner.adapters.lora_rules import check_lora, check_model, check_rank, check_targets
from learner.servers.compatibility import check_base, check_lengths, check_server
from learner.trainer.checks import check_grpo, correction_warnings
from shared.errors import ErrorCode, LockstepError
from shared.weights import BaseFingerprint

BASE = BaseFingerprint(weights="a" * 32, tokenizer="b" * 32, chat_template="c" * 32)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_modules instead"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_refuses_what_is_not_plain_lora(settings, word):
    config = LoraConfig()
    for name, value in settings.items():  # set afterwards: some need packages or models to be constructed
        setattr(config, name, value)
    with pytest.raises(LockstepError, match=word) as caught:
        check_lora(config)
    assert caught.value.code is ErrorCode.UNSUPPORTED_ADAPTER


def test_refuses_full_fine_tuning_and_other_adapters():
    with pytest.raises(LockstepError, match="use_peft"):
        check_lora(None)
    with pytest.raises(LockstepError, match=r"use peft\.LoraConfig"):
        check_lora(PromptTuningConfig(num_virtual_tokens=4))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False},
        {
            "lora_dropout": 0.1,
            "layers_to_transform": [0],
            "layers_pattern": "layers",
            "target_modules": ["q_proj"],
        },
    ],
)
def test_plain_lora_passes(settings):
    check_lora(LoraConfig(**settings))


def test_rank_pattern_counts(server_state):
    check_rank(LoraConfig(r=16), server_state)
    with pytest.raises(LockstepError, match="--max-lora-rank 32") as caught:
        check_rank(LoraConfig(r=8, rank_pattern={"q_proj": 32}), server_state)
    assert caught.value.code is ErrorCode.RANK_TOO_HIGH


def test_targets():
    check_targets(["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"], mixture_of_experts=True)
    with pytest.raises(LockstepError, match="mixture of experts"):
        check_targets(["model.layers.0.mlp.experts.3.up_proj"], mixture_of_experts=True)
    with pytest.raises(LockstepError, match="mixture of experts"):
        check_targets(["model.layers.0.mlp.gate"], mixture_of_experts=True)
    with pytest.raises(LockstepError, match="vision"):
        check_targets(["model.visual.blocks.0.attn.qkv"], mixture_of_experts=False)


def test_models():
    check_model(Qwen3Config())
    with pytest.raises(LockstepError, match="vision_config"):
        check_model(LlavaConfig())
    config = Qwen3Config()
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(LockstepError, match="quantized"):
        check_model(config)


@pytest.mark.parametrize(
    ("change", "word", "code"),
    [
        ({"protocol": 99}, "same lockstep-rl", ErrorCode.PROTOCOL_MISMATCH),
        ({"ready": False}, "/ready", ErrorCode.NOT_READY),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs", ErrorCode.INVALID_REQUEST),
        ({"policy_altering": ["speculative decoding"]}, "allow_policy_altering", ErrorCode.INVALID_REQUEST),
        ({"policy_altering": ["kv_cache_dtype=fp8"]}, "kv_cache_dtype=fp8", ErrorCode.INVALID_REQUEST),
    ],
)
def test_server(server_state, change, word, code):
    check_server(server_state)
    with pytest.raises(LockstepError, match=word) as caught:
        check_server(server_state.model_copy(update=change))
    assert caught.value.code is code


def test_policy_altering_can_be_allowed(server_state):
    altering = server_state.model_copy(update={"policy_altering": ["speculation"]})
    check_server(altering, allow_policy_altering=True)
    check_server(altering.model_copy(update={"allowed_altering": True}))


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
@pytest.mark.parametrize("value", [None, "other"])
def test_base(part, value):
    assert check_base(BASE, BASE) == []
    other = BASE.model_copy(update={part: value})
    for pair in ((BASE, other), (other, BASE)):
        with pytest.raises(LockstepError, match=f"{part}.*allow_base_mismatch") as caught:
            check_base(*pair)
        assert caught.value.code is ErrorCode.BASE_MISMATCH
        assert len(check_base(*pair, allow_mismatch=True)) == 1


def test_unknown_bases_never_match():
    unknown = BASE.model_copy(update={"weights": None})
    with pytest.raises(LockstepError, match="cannot be fingerprinted"):
        check_base(unknown, unknown)


def test_another_chat_template_is_a_warning():
    assert "chat template" in check_base(BASE, BASE.model_copy(update={"chat_template": "x"}))[0]


def test_lengths(server_state):
    check_lengths(100, 28, server_state)
    check_lengths(None, 28, server_state)
    with pytest.raises(LockstepError, match="--max-model-len"):
        check_lengths(101, 28, server_state)


def test_vespo_needs_token_level_correction(grpo):
    check_grpo(grpo(loss_type="vespo", vllm_importance_sampling_mode="token_truncate"))
    with pytest.raises(LockstepError, match="token_truncate"):
        check_grpo(grpo(loss_type="vespo"))


def test_greedy_training_is_refused(grpo):
    for args in (grpo(temperature=0.0), grpo(generation_kwargs={"temperature": 0.0})):
        with pytest.raises(LockstepError, match="temperature"):
            check_grpo(args)


CUTS = [
    {"generation_kwargs": {"min_tokens": 3}},
    {"generation_kwargs": {"bad_words": ["no"]}},
    {"generation_kwargs": {"allowed_token_ids": [1, 2]}},
    {"vllm_structured_outputs_regex": "[0-9]+"},
]


@pytest.mark.parametrize("settings", CUTS)
def test_cuts_whose_mass_is_unknown(grpo, settings):
    with pytest.raises(LockstepError, match="vllm_importance_sampling_correction=false"):
        check_grpo(grpo(**settings))
    off = {"vllm_importance_sampling_correction": False, **settings}
    check_grpo(grpo(**off))
    assert "as if they were the policy's" in correction_warnings(grpo(**off))[0]
    with pytest.raises(LockstepError, match="off_policy_mask_threshold"):
        check_grpo(grpo(off_policy_mask_threshold=0.1, **off))


def test_temperatures_that_the_server_would_raise(grpo):
    with pytest.raises(LockstepError, match=r"0\.01 or above"):
        check_grpo(grpo(temperature=0.005))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"generation_kwargs": {"logit_bias": {3: 1.0}}}, "logit_bias"),
        ({"temperature": 1.0, "generation_kwargs": {"temperature": 0.7}}, "generation_kwargs.temperature"),
    ],
)
def test_reweighted_sampling_is_a_warning(grpo, settings, named):
    check_grpo(grpo(**settings))
    (warning,) = correction_warnings(grpo(**settings))
    assert named in warning
    assert "ratios" in warning


def test_truncation_and_temperature_need_no_warning(grpo):
    args = grpo(top_p=0.9, top_k=50, min_p=0.05, temperature=0.7)
    check_grpo(args)
    assert correction_warnings(args) == []
