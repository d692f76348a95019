"""What `attach` puts around methods of a `trl.GRPOTrainer`; the names it relies on are checked there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from trl import GRPOTrainer

from learner.rollouts.dynamic_sampling import DynamicSampling
from learner.rollouts.generation import RemoteRollouts
from learner.rollouts.mismatch import Correction, Mismatch, measure
from learner.trainer.padding import may_regroup, scored, sorted_windows


def skip_padding(trainer: GRPOTrainer) -> None:
    """Forward passes on the columns their rows need, with rows of like length in one micro-batch."""
    trainer._get_per_token_logps_and_entropies = partial(
        scored, trainer._get_per_token_logps_and_entropies, multiple_of=trainer.pad_to_multiple_of or 1
    )
    args, prepare = trainer.args, trainer._prepare_inputs
    if not may_regroup(args, entropy_bonus=trainer._entropy_bonus_enabled, aux_loss=trainer.aux_loss_enabled):
        return

    def prepare_sorted(generation_batch: Any) -> dict[str, Any]:
        before = trainer._buffered_inputs
        inputs = prepare(generation_batch)
        if trainer._buffered_inputs is before:
            return inputs
        trainer._buffered_inputs = sorted_windows(trainer._buffered_inputs, args.gradient_accumulation_steps)
        return trainer._buffered_inputs[trainer._step % args.steps_per_generation]

    trainer._prepare_inputs = prepare_sorted


def begin_passes_with(trainer: GRPOTrainer, begin: Callable[[], None]) -> None:
    """Call `begin` before each of TRL's forward passes: of the policy, also in the loss, and of the reference."""
    score = trainer._get_per_token_logps_and_entropies

    def scored_after(*args: Any, **kwargs: Any) -> Any:
        begin()
        return score(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = scored_after


def mark_tool_turns(trainer: GRPOTrainer, rollouts: RemoteRollouts) -> None:
    """Let `rollouts` know which generations of TRL go on with completions whose tools have answered."""
    loop = trainer._tool_call_loop

    def loop_of_later_turns(*args: Any, **kwargs: Any) -> Any:
        with rollouts.later_turns():
            return loop(*args, **kwargs)

    trainer._tool_call_loop = loop_of_later_turns


def watch_mismatch(trainer: GRPOTrainer, saw: Callable[[Mismatch], None]) -> None:
    """Hand the drift of every training generation batch to `saw`; TRL keeps no ratio from before its clipping."""
    generate, reduce = trainer._generate_and_score_completions, partial(trainer.accelerator.reduce, reduction="sum")
    args = trainer.args
    correction = Correction(
        args.vllm_importance_sampling_mode,
        args.vllm_importance_sampling_clip_min,
        args.vllm_importance_sampling_clip_max,
    )

    def generate_and_measure(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = generate(inputs)
        if args.vllm_importance_sampling_correction and trainer.model.training:
            saw(measure(batch, correction, reduce))
        return batch

    trainer._generate_and_score_completions = generate_and_measure


def replace_degenerate(trainer: GRPOTrainer, dynamic: DynamicSampling, rollouts: RemoteRollouts) -> None:
    """Let TRL train on rows of which groups without variance were replaced, with their completions.

    Comes after all that reads the rows TRL is given.
    """
    generate, logged = trainer._generate_and_score_completions, trainer._metrics["train"]

    def generate_replaced(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not trainer.model.training:
            return generate(inputs)
        batch = rollouts.batch()
        prompts = [list(ids) for ids in trainer._tokenize_prompts([row["prompt"] for row in inputs])[0]]
        rollouts.sync_weights()
        dynamic.expect(batch, inputs, prompts)
        completions = rollouts.draw(prompts)
        draw = dynamic.take(batch)
        rollouts.hold(draw.prompts, completions)
        for name, count in (("replaced", draw.replaced), ("kept", draw.kept)):
            logged[f"lockstep/degenerate_{name}"].append(float(count))
        return generate(draw.rows)

    trainer._generate_and_score_completions = generate_replaced
