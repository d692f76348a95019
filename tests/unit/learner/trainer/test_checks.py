"""Refusals of GRPO options, each with a word on what to do instead."""

from __future__ import annotations

import dataclasses
import functools
import math
from contextlib import nullcontext

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from learner.config import LearnerConfig
from learner.trainer.checks import (
    check_attention,
    check_best_metric,
    check_callable,
    check_corrected,
    check_evaluated,
    check_grpo,
)
from shared.errors import LockstepError


def test_vespo_needs_token_level_correction(grpo):
    check_grpo(grpo(loss_type="vespo", vllm_importance_sampling_mode="token_truncate"))
    with pytest.raises(LockstepError, match="token_truncate"):
        check_grpo(grpo(loss_type="vespo"))


def test_a_loss_that_divides_by_the_length_needs_one(grpo):
    check_grpo(grpo(max_completion_length=None))
    with pytest.raises(LockstepError, match="max_completion_length"):
        check_grpo(grpo(max_completion_length=None, loss_type="dr_grpo"))


def test_numbers_are_finite_unless_they_are_bounds(grpo):
    check_grpo(grpo(max_grad_norm=math.inf, delta=math.inf, epsilon_high=math.inf, entropy_coef_max=math.inf))
    for name, value in {"learning_rate": math.inf, "max_grad_norm": math.nan, "reward_weights": [math.nan]}.items():
        with pytest.raises(LockstepError, match=f"{name} (inf|nan): give a finite number"):
            check_grpo(grpo(**{name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LearnerConfig) if "float" in str(f.type)])
def test_numbers_of_our_own_options_are_finite(field, value):
    with pytest.raises(ValueError, match=field):
        LearnerConfig(**{field: value})


def test_rewards_that_cannot_be_called_are_named():
    def plain(prompts, completions, **_): ...

    def of_columns(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer): ...

    def without_rest(completions, answer): ...

    def of_another_column(completions, gold, **_): ...

    @functools.wraps(without_rest)
    def chooses(**columns):
        return without_rest(columns["completions"], columns["answer"])

    check_callable(
        [plain, of_columns, max, functools.partial(plain, extra=1), chooses, nn.Linear(1, 1)],
        ["prompt", "completion", "answer"],
    )
    with pytest.raises(LockstepError, match=r"'without_rest' cannot be called: .*'prompts'.* add \*\*_ for those"):
        check_callable([plain, without_rest], ["prompt", "answer"])
    with pytest.raises(LockstepError, match=r"'of_another_column' .* missing .* 'gold'.* log_metric, answer, by name"):
        check_callable([of_another_column], ["prompt", "answer"])


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
    assert "as if they were the policy's" in check_grpo(grpo(**off))[0]
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
    (warning,) = check_grpo(grpo(**settings))
    assert named in warning
    assert "ratios" in warning


def test_truncation_and_temperature_need_no_warning(grpo):
    args = grpo(top_p=0.9, top_k=50, min_p=0.05, temperature=0.7)
    assert check_grpo(args) == []


def test_stale_samples_need_a_correction_or_a_mask(grpo):
    off = {"vllm_importance_sampling_correction": False}
    with pytest.raises(LockstepError, match="off_policy_mask_threshold, or max_staleness=0"):
        check_corrected(grpo(**off), LearnerConfig(max_staleness=1))
    check_corrected(grpo(**off), LearnerConfig())
    check_corrected(grpo(), LearnerConfig(max_staleness=1))
    check_corrected(grpo(off_policy_mask_threshold=0.1, **off), LearnerConfig(max_staleness=1))


@pytest.mark.parametrize(("attention", "refused"), [("sdpa", True), ("eager", False)])
def test_an_attention_that_leaves_out_the_cap_of_logits_is_refused(attention, refused):
    config = Gemma2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config, attn_implementation=attention), LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(LockstepError, match="eager") if refused else nullcontext():
        check_attention(model)


def test_a_training_has_at_least_one_step(grpo):
    for steps in ({"max_steps": 0}, {"num_train_epochs": 0}):
        with pytest.raises(LockstepError, match="at least one step"):
            check_grpo(grpo(**steps))
    check_grpo(grpo(max_steps=1, num_train_epochs=0))


def test_batches_of_text_cannot_be_dispatched(grpo):
    with pytest.raises(LockstepError, match="dispatch_batches"):
        check_grpo(grpo(accelerator_config={"dispatch_batches": True}))
    check_grpo(grpo(accelerator_config={"dispatch_batches": False}))


@pytest.mark.parametrize("rows", [None, [], {"easy": [1], "hard": []}])
def test_an_evaluation_that_is_asked_for_has_rows(grpo, rows):
    for asked in ({"eval_on_start": True}, {"eval_strategy": "steps", "eval_steps": 1}):
        with pytest.raises(LockstepError, match=f"{next(iter(asked))}: there are no rows"):
            check_evaluated(grpo(**asked), rows)
        check_evaluated(grpo(**asked), {"easy": [1]})
    check_evaluated(grpo(), rows)


def test_the_best_models_metric_is_one_that_is_measured(grpo):
    def logs(completions, **more):
        more["log_metric"]("own", 1.0)

    args = grpo(eval_strategy="steps", eval_steps=1, metric_for_best_model="own")
    with pytest.raises(LockstepError, match="eval_loss"):
        check_best_metric(args, [lambda completions, **_: [1.0]])
    check_best_metric(args, [logs])
    for known in ("loss", "eval_reward", "rewards/odd/mean"):
        check_best_metric(grpo(eval_strategy="steps", eval_steps=1, metric_for_best_model=known), [])
