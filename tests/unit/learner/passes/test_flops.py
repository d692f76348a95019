"""Which weights count in the utilisation of a device."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from learner.passes.flops import multiplied_weights, peak_flops

SMALL = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
#: q, k, v and o with two query heads and one of keys and values, then the three of the MLP.
OF_LAYER = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 12


def test_linear_layers_count_and_neither_head_nor_adapter() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=4, tie_word_embeddings=False))
    assert multiplied_weights(model) == 2 * OF_LAYER


def test_the_same_under_an_adapter() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=4, tie_word_embeddings=True))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert multiplied_weights(adapted.get_base_model()) == 2 * OF_LAYER


def test_experts_are_not_counted_as_if_all_were_used() -> None:
    assert multiplied_weights(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))) is None


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
