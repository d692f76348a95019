"""Trainings of TRL that benchmarks measure, alike but for what they compare."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from trl import GRPOConfig

#: Small, so that the lengths of completions stay what they are. Every weight of the adapter still changes.
LEARNING_RATE = 1e-6


def grpo_config(
    options: Namespace,
    *,
    output: str,
    cpu: bool,
    dtype: str,
    max_steps: int,
    micro_batch: int | None = None,
    ranks: int = 1,
    checkpointing: bool = False,
    kind: Callable[..., Any] = GRPOConfig,
    **others: Any,
) -> Any:
    """Return TRL's options for steps of `options.batch` completions, `options.group` for each prompt.

    Args:
        options: with `batch`, `group`, `micro_batch`, and `tokens`, the most that a completion has.
        micro_batch: in place of that of `options`.
        ranks: which share a step.
        checkpointing: of activations.
        kind: the trainer's class of options.
        others: further fields of it; they win.
    """
    micro_batch = micro_batch or options.micro_batch
    fields = {
        "output_dir": output,
        "use_cpu": cpu,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": options.batch // (micro_batch * ranks),
        "num_generations": options.group,
        "max_completion_length": options.tokens,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": max_steps,
        "seed": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(**fields | others)


def lora_config(rank: int) -> LoraConfig:
    """Return an adapter of all linear layers."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of odd token ids: a reward that costs nothing and does not depend on lengths."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
