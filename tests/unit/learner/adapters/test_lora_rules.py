"""Refusals of adapters and models, each with a word on what to do instead."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, PromptTuningConfig
from transformers import LlavaConfig, Qwen3Config

from learner.adapters.lora_rules import check_lora, check_model, check_rank, check_targets, unused_patterns
from shared.errors import ErrorCode, LockstepError


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


def test_patterns_of_no_layer_are_named():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    used = {"q_proj": 8, r"layers\.1\..*": 4, "^model.layers.0.self_attn.q_proj": 2}
    assert unused_patterns(LoraConfig(rank_pattern=used, alpha_pattern=used), names) == []
    (line,) = unused_patterns(LoraConfig(rank_pattern={"q_proj": 8}, alpha_pattern={"proj": 3}), names)
    assert line == "alpha_pattern: no adapted layer is called 'proj'; there are q_proj, up_proj"


@pytest.mark.parametrize("settings", [{"lora_alpha": float("inf")}, {"alpha_pattern": {"q_proj": float("nan")}}])
def test_alphas_are_finite(settings):
    with pytest.raises(LockstepError, match="finite number"):
        check_lora(LoraConfig(**settings))


def test_rank_pattern_counts(server_state):
    check_rank(LoraConfig(r=16), server_state)
    with pytest.raises(LockstepError, match="--max-lora-rank 32") as caught:
        check_rank(LoraConfig(r=8, rank_pattern={"q_proj": 32}), server_state)
    assert caught.value.code is ErrorCode.RANK_TOO_HIGH


@pytest.mark.parametrize(("rank", "word"), [(17, "--max-lora-rank 32"), (300, "320"), (512, "512"), (513, "no server")])
def test_the_advice_is_a_rank_that_vllm_serves(server_state, rank, word):
    with pytest.raises(LockstepError, match=word):
        check_rank(LoraConfig(r=rank), server_state)


def test_targets():
    check_targets(["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"], mixture_of_experts=True)
    with pytest.raises(LockstepError, match="experts of a mixture"):
        check_targets(["model.layers.0.mlp.experts.3.up_proj"], mixture_of_experts=True)
    with pytest.raises(LockstepError, match="experts of a mixture"):
        check_targets(["model.layers.0.mlp.gate"], mixture_of_experts=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.visual.blocks.0.attn.qkv",
        "model.visual.merger.mlp.0",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "model.audio_tower.layers.0.self_attn.q_proj",
        "model.connector.modality_projection.proj",
    ],
)
def test_a_target_outside_the_language_model_is_refused_with_a_pattern_that_works(name):
    with pytest.raises(LockstepError, match=r"target_modules '") as caught:
        check_targets([name], mixture_of_experts=False)
    pattern = re.search(r"target_modules '(.*?)' ", caught.value.message)
    assert pattern
    assert not re.fullmatch(pattern[1], name)
    assert re.fullmatch(pattern[1], "model.language_model.layers.0.self_attn.q_proj")


def test_models():
    check_model(Qwen3Config())
    check_model(LlavaConfig())
    config = Qwen3Config()
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(LockstepError, match="quantized"):
        check_model(config)
