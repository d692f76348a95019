"""Forward passes without the padding of longer batches.

TRL pads a generation batch to its longest prompt and completion, and every micro-batch keeps that width. Here rows of
like length are put together, each forward pass is cut to its longest row, and its outputs are padded back with zeros,
as TRL's head returns at padding. All shapes outside the forward pass stay as they were.

In float32 losses are the same to five digits. In 16 bits the rounding of a row's logprobs depends on what shares its
pass and how wide that is, so two passes of one row at the same weights differ, and the policy's ratio would not be 1:
`keep_old_values` makes it 1. Where the angles of positions depend on the width (longrope, dynamic NTK), cutting would
change the function itself, so nothing is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from trl import GRPOTrainer

from learner.trainer.between_trainings import forget_between_trainings

logger = logging.getLogger("lockstep.passes")

Logps = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
#: Losses that sum over rows with a divisor that is the same for every micro-batch of an optimizer step.
ROWWISE_LOSSES = ("grpo", "sapo", "dr_grpo", "dapo", "cispo", "vespo", "luspo")
#: RoPE types whose angles depend on the longest row of a pass.
_WIDTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def width_dependent_ropes(model: Any) -> list[str]:
    """Return the RoPE types of `model` whose angles depend on the width of a pass."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    return sorted(kinds & _WIDTH_DEPENDENT_ROPE)


def cut_passes(trainer: GRPOTrainer) -> None:
    """Cut forward passes to the columns their rows need, unless positions depend on the width."""
    if ropes := width_dependent_ropes(trainer.accelerator.unwrap_model(trainer.model)):
        logger.info("forward passes are not cut: their positions depend on the width (rope_type %s)", ", ".join(ropes))
        return
    trainer._get_per_token_logps_and_entropies = partial(
        _score_cut, trainer._get_per_token_logps_and_entropies, multiple_of=trainer.pad_to_multiple_of or 1
    )


def sort_rows(trainer: GRPOTrainer) -> None:
    """Put rows of like length into one micro-batch.

    Only where an optimizer step does not depend on how its rows are spread over micro-batches. Not so where
    TRL divides or picks within each micro-batch: `bnpo`'s token count, the mean entropy of the bonus, the quantile of
    `top_entropy_quantile`, the load balance of a mixture of experts; nor where the optimizer steps do not divide a
    generation batch evenly. Nor where passes are not cut.
    """
    args, prepare = trainer.args, trainer._prepare_inputs
    if (
        args.loss_type not in ROWWISE_LOSSES
        or args.top_entropy_quantile != 1.0
        or trainer._entropy_bonus_enabled
        or trainer.aux_loss_enabled
        or args.gradient_accumulation_steps == 1
        or width_dependent_ropes(trainer.accelerator.unwrap_model(trainer.model))
        or args.steps_per_generation % args.gradient_accumulation_steps
    ):
        return

    def prepare_sorted(generation_batch: Any) -> dict[str, Any]:
        before = trainer._buffered_inputs
        inputs = prepare(generation_batch)
        if trainer._buffered_inputs is before:
            return inputs
        trainer._buffered_inputs = sorted_windows(trainer._buffered_inputs, args.gradient_accumulation_steps)
        return trainer._buffered_inputs[trainer._step % args.steps_per_generation]

    trainer._prepare_inputs = prepare_sorted


def keep_old_values(trainer: GRPOTrainer) -> None:
    """Let the loss start from TRL's `old_per_token_logps` as long as the weights are those that they were scored at.

    Gradients are those of the loss's own pass. Not where two passes are of two networks (`randomness`).
    """
    generate, compute = trainer._generate_and_score_completions, trainer._compute_loss
    score, known = trainer._get_per_token_logps_and_entropies, _Known()

    def generate_and_note(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = generate(inputs)
        if trainer.model.training:
            known.at = trainer.state.global_step
        return batch

    def compute_noted(model: Any, inputs: dict[str, Any]) -> Any:
        if trainer.model.training and known.at == trainer.state.global_step:
            known.logps = inputs.get("old_per_token_logps")
        try:
            return compute(model, inputs)
        finally:
            known.logps = None

    def score_known(*positional: Any, **options: Any) -> Logps:
        logps, *others = score(*positional, **options)
        if known.logps is not None:
            logps = known.logps + (logps - logps.detach())
        return (logps, *others)

    trainer._generate_and_score_completions = generate_and_note
    trainer._compute_loss = compute_noted
    trainer._get_per_token_logps_and_entropies = score_known
    forget_between_trainings(trainer, known.forget)


class _Known:
    """The step at which the present generation batch was scored, and during a loss at that step its logprobs [B, T]."""

    at: int | None = None
    logps: torch.Tensor | None = None

    def forget(self) -> None:
        self.at = None


def _score_cut(
    score: Callable[..., Logps],
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    *,
    batch_size: int | None = None,
    multiple_of: int,
    **options: Any,
) -> Logps:
    """Run TRL's `_get_per_token_logps_and_entropies`, each forward pass on as few columns as its rows need.

    Args:
        input_ids, attention_mask: [B, P + T]; prompts padded on the left to P, completions on the right to T.
        logits_to_keep: T.
        batch_size: rows of one forward pass, which are taken in order of their length; None: all.
        multiple_of: widths of prompt and completion are rounded up to this (TRL's `pad_to_multiple_of`).
        options: passed on. Tensors among them (images) would need cutting too, so nothing is cut then.

    Returns:
        Logprobs [B, T] and, where `options` request them, entropies [B, T] and the auxiliary loss.
    """
    if any(isinstance(value, torch.Tensor) for value in options.values()):
        return score(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **options)
    rows, width_P = input_ids.size(0), input_ids.size(1) - logits_to_keep
    batch_size = min(batch_size or rows, rows)
    prompt_B = attention_mask[:, :width_P].sum(1)
    completion_B = attention_mask[:, width_P:].sum(1)
    order_B = (prompt_B + completion_B).argsort(descending=True, stable=True)
    # One copy from the device for all passes.
    lengths = torch.stack([prompt_B, completion_B], 1)[order_B].tolist()
    parts: list[Logps] = []
    for start in range(0, rows, batch_size):
        chosen_B = order_B[start : start + batch_size]
        longest_P, longest_T = (max(column) for column in zip(*lengths[start : start + batch_size], strict=True))
        keep_P = min(-(-longest_P // multiple_of) * multiple_of, width_P)
        keep_T = min(-(-max(longest_T, 1) // multiple_of) * multiple_of, logits_to_keep)
        columns = slice(width_P - keep_P, width_P + keep_T)
        logps_BT, entropies_BT, aux_loss = score(
            model, input_ids[chosen_B, columns], attention_mask[chosen_B, columns], keep_T, **options
        )
        pad = partial(torch.nn.functional.pad, pad=(0, logits_to_keep - keep_T))
        parts.append((pad(logps_BT), None if entropies_BT is None else pad(entropies_BT), aux_loss))
    back_B = order_B.argsort()
    logps, entropies, aux_losses = zip(*parts, strict=True)
    return (
        torch.cat(logps)[back_B],
        None if entropies[0] is None else torch.cat(entropies)[back_B],
        None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
    )


def sorted_windows(micro_batches: Sequence[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Put rows of like length into one micro-batch, longest first (so that memory runs out at once).

    Rows are permuted only within `window` micro-batches, which make one optimizer step.
    """
    regrouped = []
    for start in range(0, len(micro_batches), window):
        step = micro_batches[start : start + window]
        length_B = torch.cat([(b["prompt_mask"].sum(1) + b["completion_mask"].sum(1)) for b in step])
        order_B = length_B.argsort(descending=True, stable=True)
        rows = [len(batch["completion_mask"]) for batch in step]
        columns = {key: _regrouped([batch[key] for batch in step], order_B, rows) for key in step[0]}
        regrouped += [{key: values[i] for key, values in columns.items()} for i in range(len(step))]
    return regrouped


def _regrouped(values: list[Any], order_B: torch.Tensor, rows: list[int]) -> Sequence[Any]:
    """Permute one key of the micro-batches: the rows of tensors and lists; anything else is of the complete batch."""
    if isinstance(values[0], torch.Tensor) and values[0].ndim > 0:
        return torch.cat(values)[order_B].split(rows)
    if isinstance(values[0], list):
        joined = [item for value in values for item in value]
        items = iter([joined[i] for i in order_B.tolist()])
        return [list(islice(items, n)) for n in rows]
    return values
