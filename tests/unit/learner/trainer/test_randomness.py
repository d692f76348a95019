"""Randomness of training passes is found, whatever a model calls it, and named with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from trl import GRPOConfig

from learner.trainer.attach import attach
from learner.trainer.randomness import as_warnings, randomness

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "intermediate_size": 16, "num_key_value_heads": 2}


def found(model: torch.nn.Module, args: GRPOConfig, **options: Any) -> dict[str, str]:
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **options))
    state, modes = torch.get_rng_state(), [module.training for module in peft.modules()]
    result = randomness(peft, args)
    assert torch.equal(torch.get_rng_state(), state), "the training would draw other numbers"
    assert [module.training for module in peft.modules()] == modes
    return result


@pytest.fixture
def args(tmp_path) -> GRPOConfig:
    return GRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)


def opt(**changes: Any) -> torch.nn.Module:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16, **changes))


def starcoder(**changes: Any) -> torch.nn.Module:
    return Starcoder2ForCausalLM(Starcoder2Config(**GROUPED, **changes))


def qwen(**changes: Any) -> torch.nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8, **changes))


@pytest.mark.parametrize(
    ("make", "what", "remedy"),
    [
        (opt, "dropout is 0.1", '{"dropout": 0.0}'),  # by default
        (lambda: opt(dropout=0.0, layerdrop=0.5), "layerdrop is 0.5", '{"layerdrop": 0.0}'),
        (lambda: starcoder(residual_dropout=0.2), "residual_dropout is 0.2", '{"residual_dropout": 0.0}'),
        (lambda: starcoder(embedding_dropout=0.2), "embedding_dropout is 0.2", '{"embedding_dropout": 0.0}'),
        (lambda: qwen(attention_dropout=0.1), "attention_dropout is 0.1", '{"attention_dropout": 0.0}'),
        (
            lambda: PhimoeForCausalLM(PhimoeConfig(**GROUPED, num_local_experts=2)),
            "router_jitter_noise is 0.01",
            "another number would change what the model computes",  # in eval() as well
        ),
    ],
)
def test_what_is_no_module_is_found(args: GRPOConfig, make: Any, what: str, remedy: str) -> None:
    result = found(make(), args)
    assert remedy in result[what]
    assert any(what in warning and remedy in warning for warning in as_warnings(result))


@pytest.mark.parametrize("make", [qwen, starcoder, lambda: opt(dropout=0.0)], ids=["qwen3", "starcoder2", "opt"])
def test_without_any_nothing_is_found(args: GRPOConfig, make: Any) -> None:
    changes = {"residual_dropout": 0.0, "embedding_dropout": 0.0} if make is starcoder else {}
    assert found(make(**changes), args) == {}


def test_dropout_of_modules_and_noise_of_the_trainer_are_found(args: GRPOConfig) -> None:
    args.neftune_noise_alpha = 5.0
    result = found(qwen(), args, lora_dropout=0.05)
    assert list(result) == ["lora_dropout is 0.05", "neftune_noise_alpha is 5"]


def test_what_has_no_name_is_found_by_what_it_does(args: GRPOConfig) -> None:
    model = qwen()
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inner(x) * (1 + torch.rand(()) if model.training else 1)
    (what,) = found(model, args)
    assert what.startswith("something else makes the logits of two passes differ")
    model.model.layers[0].mlp.forward = inner
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert randomness(peft, args) == {}
    assert randomness(peft, args, most=lambda own: 0.5), "another rank has found it"


def test_a_training_with_noise_is_not_taken_for_servers_that_lie(make_trainer, server, client) -> None:
    trainer = make_trainer(neftune_noise_alpha=5.0, max_steps=2)
    with pytest.warns(UserWarning, match="neftune_noise_alpha is 5"):
        session = attach(trainer, client=client)
    trainer.train()
    session.close()
    assert session.metrics.pushes == 2
