"""Score TRL's batches in packed passes, whose size does not depend on its micro-batches.

TRL makes a forward pass for every micro-batch of its loss. Here the values that the loss starts from are known before:
they are those of `old_per_token_logps`, scored a moment ago with the same weights in passes of `max_tokens_per_pass`.
The loss is differentiated with respect to them alone; once an optimizer step's micro-batches have delivered these
gradients, its rows run again in packed passes, each forward and backward, so that activations of one pass are kept at a
time (gradient caching, arXiv:2101.06983, at the logprobs). Whatever TRL makes of logprobs and entropies holds as it is.

A generation batch that is one optimizer step and fits into one pass is not run again: its scoring pass keeps its graph.

Where the values are not known (weights have changed since, or TRL needs no old logprobs), a micro-batch that fits into
one pass is scored in it with its graph; a larger one is scored first and runs again as above.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from trl import GRPOTrainer

from learner.passes import attention
from learner.passes.lora_product import written_once
from learner.passes.packing import PackedPass, Row, plan_passes, rows_of
from learner.trainer.between_trainings import forget_between_trainings
from learner.trainer.forks import Forks
from learner.trainer.kept_pass import Keeping, KeptPass
from learner.trainer.memory import let_segments_grow
from learner.trainer.padding import width_dependent_ropes
from learner.utils.gpu_memory import free_bytes

logger = logging.getLogger("lockstep.passes")

Logps = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
#: Key in TRL's batches: entropies [B, T] that belong to `old_per_token_logps`.
ENTROPIES = "lockstep_entropies"
#: Tokens of one pass where nothing else is set: at first, and the most that a GPU's memory is found to have room for.
#: A CPU has no use for larger passes, nor has a GPU, except where the model is narrow: up to so many hidden numbers it
#: computes a pass faster than it is launched.
_FIRST_TOKENS, _MOST_TOKENS, _MOST_HIDDEN = 2048, 8192, 2**24
#: Share of the free memory that a pass may take: batches differ, and there is more than this process.
_OF_FREE = 0.6
#: Rows of the first batch that are scored both ways, and the largest mean difference in nats, by bytes of an element.
_CHECKED_ROWS, _CHECK_NATS = 4, {4: 1e-3, 2: 0.1}


def why_not_packed(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why passes of this model cannot be packed; None if they can.

    Args:
        model: without its PEFT wrapper.
        dtype: of the computation, after autocast.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} brings an attention of its own"
    if kinds or sliding:
        return f"{type(model).__name__} has {', '.join(sorted(kinds)) or 'sliding_attention'} layers"
    if getattr(config, "attn_logit_softcapping", None) or hasattr(config, "attention_chunk_size"):
        return f"the attention of {type(model).__name__} is none that the packed kernel computes"
    if getattr(config, "attention_dropout", 0.0):
        return "attention_dropout is not 0"
    if ropes := width_dependent_ropes(model):
        return f"its positions depend on the longest row (rope_type {', '.join(ropes)})"
    if device.type == "cuda" and (dtype.itemsize != 2 or torch.cuda.get_device_capability(device) < (8, 0)):
        return "torch's variable-length attention needs bfloat16 or float16, and compute capability 8.0"
    return None


def score_packed(
    trainer: GRPOTrainer, max_tokens: int | None, forks: Forks | None = None, *, is_random: bool = False
) -> PackedScoring | None:
    """Put packed scoring around `trainer`; return None, and say why, if its passes cannot be packed.

    Args:
        forks: knows which rows hold several sequences; None: none does.
        is_random: two passes are of two networks (`randomness`), so nothing is scored ahead.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    device = trainer.accelerator.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision, model.dtype)
    reason = why_not_packed(model, device, dtype)
    if reason is None and trainer.aux_loss_enabled:
        reason = "the load-balancing loss of a mixture of experts is a mean over each micro-batch"
    if reason is None and device.type != "cpu" and trainer.args.full_determinism:
        reason = "full_determinism"
    if reason:
        logger.info("forward passes are not packed: %s", reason)
        return None
    let_segments_grow(device)
    return PackedScoring(trainer, model, max_tokens, forks or Forks(), is_random=is_random)


@dataclass(frozen=True)
class _Owed:
    """Rows whose gradient has arrived from the loss, and whose backward pass has not been made."""

    rows: list[Row]
    logps: torch.Tensor
    entropies: torch.Tensor | None


class PackedScoring:
    """Takes the place of TRL's `_get_per_token_logps_and_entropies`.

    Args:
        model: the base model, whose attention is switched.
        max_tokens: of one pass; None: found out. Not kept where weights are sharded: there every rank makes one pass a
            micro-batch, because ranks gather weights together.
        is_random: see `score_packed`.

    Attributes:
        scores_apart: the last generation batch was scored in passes of its own, or its reference was.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        model: PreTrainedModel,
        max_tokens: int | None,
        forks: Forks,
        *,
        is_random: bool,
    ) -> None:
        self._forks = forks
        self._trainer, self._max_tokens = trainer, max_tokens or _FIRST_TOKENS
        self._finds_out = max_tokens is None and trainer.accelerator.device.type == "cuda"
        self.sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        self._is_random = is_random
        self._model = model
        self._configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
        # Not the property, which would set every part's: a vision tower keeps its own.
        self._own_attention = [config._attn_implementation_internal for config in self._configs]
        self._checked = self._refused = False
        self._inputs: dict[str, Any] | None = None
        # While TRL makes a generation batch: logprobs, entropies, and the pass if it is kept.
        self._scored: list[tuple[torch.Tensor, torch.Tensor, KeptPass | None]] | None = None
        self._keeping = None if is_random or self.sharded else Keeping(trainer)
        self._kept: KeptPass | None = None
        self.scores_apart = True
        self._known_at: int | None = None  # the step at which the present generation batch was scored
        self._owed: list[_Owed] = []
        self._plain = trainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = self.score
        trainer._generate_and_score_completions = self._keeping_entropies(trainer._generate_and_score_completions)
        trainer._compute_loss = self._seeing_inputs(trainer._compute_loss)
        trainer.training_step = self._with_backward(trainer.training_step)
        forget_between_trainings(trainer, self.forget)

    def score(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> Logps:
        """Return logprobs and entropies [B, T], zero at padding.

        Args:
            input_ids, attention_mask: [B, P + T]; prompts padded on the left to P, completions on the right to T.
            logits_to_keep: T.
            batch_size: rows that ranks with sharded weights score in one pass; None: all.
            options: images and the like, which are not packed.
        """
        rows = None
        if not self._refused and all(value is None or value is False for value in options.values()):
            rows = rows_of(input_ids, attention_mask, logits_to_keep, self._forks.parts)
        if rows is not None and not self._checked:
            self._check_first(model, input_ids, attention_mask, logits_to_keep, rows)
        if rows is None or not self._checked or self._refused:
            return self._plain(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                **options,
            )
        if not torch.is_grad_enabled():
            keeps = self._scored is not None and self._keeping is not None and self._keeping.keeps
            logps, entropies, kept = self._score_all(model, rows, logits_to_keep, batch_size, keeps=keeps)
            if self._scored is not None:
                self._scored.append((logps, entropies, kept))
            return logps, entropies, None
        known = self._known()
        # Several ranks (DDP) add up their gradients once a step, so all of them owe theirs.
        fits = self._trainer.accelerator.num_processes == 1 and self._tokens(rows) <= self._max_tokens
        if known is None and (self.sharded or self._is_random or fits):
            (packed,) = plan_passes(rows, 2**62, input_ids.device)
            self._attend(packed=True)  # until the end of the step: checkpointed layers run again in the backward pass
            logps, entropies = _scatter([(packed, self._run(model, packed))], len(rows), logits_to_keep)
            return logps, entropies, None
        if known is None:
            with torch.no_grad():
                known = self._score_all(model, rows, logits_to_keep, None)[:2]
        anchor = torch.zeros((), requires_grad=True)
        logps, entropies = _Leaf.apply(anchor, *known, lambda *gradients: self._owed.append(_Owed(rows, *gradients)))
        return logps, entropies, None

    def _known(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return this micro-batch's logprobs and entropies at the present weights, if they were scored before."""
        inputs = self._inputs
        if inputs is None or ENTROPIES not in inputs or self._known_at != self._trainer.state.global_step:
            return None
        return inputs["old_per_token_logps"], inputs[ENTROPIES]

    @staticmethod
    def _tokens(rows: list[Row]) -> int:
        return sum(len(row.prompt) + len(row.completion) for row in rows)

    def _score_all(
        self, model: Any, rows: list[Row], width_T: int, batch_size: int | None, *, keeps: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, KeptPass | None]:
        """Return logprobs and entropies [B, T] without gradient, and with `keeps` the pass if it is the only one."""
        device = self._trainer.accelerator.device
        if self.sharded:
            size = batch_size or len(rows)
            chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        else:
            chunks = [rows]
        limit = 2**62 if self.sharded else self._max_tokens
        plans = [plan_passes(chunk, limit, device) for chunk in chunks]
        first, *others = [packed for plan in plans for packed in plan]
        # How much memory a pass needs is found out by one that is run again.
        keeps = keeps and not others and not (self._finds_out and first.input_ids.numel() >= _FIRST_TOKENS // 2)
        kept, parts = None, []
        self._attend(packed=True)
        try:
            with written_once(model), torch.enable_grad() if keeps else nullcontext():
                for chunk, plan in zip(chunks, plans, strict=True):
                    scored = [(packed, self._run(model, packed)) for packed in plan]
                    if keeps:
                        kept = KeptPass(rows, *scored[0])
                    parts.append(_scatter(scored, len(chunk), width_T))
        finally:
            self._attend(packed=False)
        logps, entropies = (torch.cat(each).detach() for each in zip(*parts, strict=True))
        return logps, entropies, kept

    def _run(self, model: Any, packed: PackedPass) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logprobs and entropies [N] of a pass."""
        with self._trainer.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                shift_labels=packed.next_ids,
                fused_lm_head=True,
                use_cache=False,
                **attention.arguments(packed),
            )
        return outputs.log_probs[0], outputs.entropy[0]

    def _backward(self, model: Any) -> None:
        """Make the backward passes that are owed for this optimizer step."""
        owed, self._owed = self._owed, []
        kept, self._kept = self._kept, None
        width = max(each.logps.shape[1] for each in owed)

        def joined(gradients: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([torch.nn.functional.pad(g, (0, width - g.shape[1])) for g in gradients])

        logps = joined([each.logps for each in owed])
        entropies = None
        if any(each.entropies is not None for each in owed):
            entropies = joined([torch.zeros_like(e.logps) if e.entropies is None else e.entropies for e in owed])
        rows = [row for each in owed for row in each.rows]
        self._attend(packed=True)
        if kept and self._known_at == self._trainer.state.global_step and (order := kept.order_of(rows)):
            entropies = None if entropies is None else entropies[order]
            _differentiate(kept.packed, kept.values, logps[order], entropies)
            return
        del kept
        passes = plan_passes(rows, self._max_tokens, logps.device)
        for number, packed in enumerate(passes, 1):
            last = number == len(passes)
            if self._finds_out:
                torch.cuda.reset_peak_memory_stats(logps.device)
                before = torch.cuda.memory_allocated(logps.device)
            with nullcontext() if last else self._trainer.accelerator.no_sync(model), written_once(model):
                _differentiate(packed, self._run(model, packed), logps, entropies)
            if self._finds_out and packed.input_ids.numel() >= _FIRST_TOKENS // 2:  # a small one shows fixed costs
                self._find_out(packed.input_ids.numel(), torch.cuda.max_memory_allocated(logps.device) - before)

    def _find_out(self, tokens: int, needed: int) -> None:
        """Set the size of later passes from the memory, in bytes, that one of `tokens` needed."""
        self._finds_out, device = False, self._trainer.accelerator.device
        free = free_bytes(device)
        self._max_tokens = pass_tokens(tokens, needed, free, self._model.config.get_text_config().hidden_size)
        logger.info(
            "passes of %d tokens: one of %d needed %.1f GiB, of %.1f that are free (max_tokens_per_pass)",
            self._max_tokens,
            tokens,
            needed / 2**30,
            free / 2**30,
        )

    def _attend(self, *, packed: bool) -> None:
        for config, own in zip(self._configs, self._own_attention, strict=True):
            config._attn_implementation_internal = attention.PACKED if packed else own

    def forget(self) -> None:
        """Forget what an earlier training owed and knew."""
        self._owed, self._kept, self._known_at = [], None, None

    def _check_first(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, width_T: int, rows: list[Row]
    ) -> None:
        """Believe packed passes of this model once they agree with plain ones on a few rows that have a completion."""
        few = [number for number, row in enumerate(rows) if row.completion][:_CHECKED_ROWS] or [0]
        chosen, training = [rows[number] for number in few], model.training
        tokens, difference, reason = sum(len(row.completion) for row in chosen), 0.0, ""
        model.eval()  # dropout would make them differ, and take random numbers that a resumed training would miss
        try:
            with torch.no_grad():
                with self._forks.of_rows(few):
                    plain = self._plain(model, input_ids[few], attention_mask[few], width_T)[0]
                packed = self._score_all(model, chosen, width_T, None)[0]
            difference = float((packed - plain).abs().sum() / max(1, tokens))
            reason = f"their logprobs differ from plain ones by {difference:.2g} nats on average"
        except torch.OutOfMemoryError:
            raise
        # A model that cannot be called this way.
        except (TypeError, RuntimeError, ValueError, AttributeError, ImportError) as error:
            difference, reason = float("inf"), f"{type(error).__name__}: {error}"
        finally:
            model.train(training)
        bits = 2 if self._trainer.accelerator.mixed_precision in ("bf16", "fp16") else self._model.dtype.itemsize
        # Every rank decides alike: with sharded weights they make their passes together.
        found = torch.tensor([[difference, float(tokens)]], device=self._trainer.accelerator.device)
        difference, compared = self._trainer.accelerator.gather(found).amax(0).tolist()
        self._checked = compared > 0
        if not difference <= _CHECK_NATS.get(bits, 1e-3):
            self._refused = True
            logger.warning("forward passes of this model are not packed: %s", reason)

    def _keeping_entropies(self, generate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def generate_and_keep(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            if not self._trainer.model.training or self.sharded or self._is_random:
                return generate(inputs)
            self._scored, self._kept = [], None
            if self._keeping:
                self._keeping.look()
            try:
                batch = generate(inputs)
                self.scores_apart = any(kept is None for *_, kept in self._scored)
                # A reference model may have been scored after the policy.
                for logps, entropies, kept in self._scored:
                    if logps is batch.get("old_per_token_logps"):
                        batch[ENTROPIES], self._known_at = entropies, self._trainer.state.global_step
                        self._kept = kept
                return batch
            finally:
                self._scored = None

        return generate_and_keep

    def _seeing_inputs(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def compute_seen(model: Any, inputs: dict[str, Any]) -> Any:
            self._inputs = inputs
            try:
                return compute(model, inputs)
            finally:
                self._inputs = None

        return compute_seen

    def _with_backward(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_backward(model: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                loss = step(model, *args, **kwargs)
                if self._owed and self._trainer.accelerator.sync_gradients:
                    began = time.perf_counter()
                    self._backward(model)
                    # TRL has timed the step without it.
                    if times := self._trainer._metrics["train"]["step_time"]:
                        times[-1] += time.perf_counter() - began
                return loss
            except BaseException:
                self.forget()
                raise
            finally:
                self._attend(packed=False)
                if self._trainer.accelerator.sync_gradients:
                    self._kept = None

        return step_and_backward


def pass_tokens(tokens: int, needed: int, free: int, hidden: int) -> int:
    """Return how many tokens a pass may have, if one of `tokens` needed so many of the free bytes.

    Args:
        hidden: numbers of a token's hidden state.

    Example:
        assert pass_tokens(1000, needed=2 * 2**30, free=10 * 2**30, hidden=4096) == 2816
    """
    fitting = _OF_FREE * free * tokens / max(needed, 1)
    return int(min(max(fitting, 256), max(_MOST_TOKENS, _MOST_HIDDEN // hidden))) // 256 * 256


class _Leaf(torch.autograd.Function):
    """Logprobs and entropies whose gradient goes to `owe`, instead of into a graph."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor, owe: Callable[..., None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.owe = owe
        ctx.set_materialize_grads(False)
        return logps.clone(), entropies.clone()

    @staticmethod
    def backward(ctx: Any, logps: torch.Tensor | None, entropies: torch.Tensor | None) -> Any:
        if logps is not None:
            ctx.owe(logps, entropies)
        return None, None, None, None


def _differentiate(
    packed: PackedPass,
    values: tuple[torch.Tensor, torch.Tensor],
    logps: torch.Tensor,
    entropies: torch.Tensor | None,
) -> None:
    """Make the backward pass of a pass with values [N] from the gradients [rows, T] of logprobs and entropies."""
    at = packed.next_ids[0] != -100
    outputs, gradients = [values[0][at]], [logps[packed.rows, packed.columns]]
    if entropies is not None:
        outputs.append(values[1][at])
        gradients.append(entropies[packed.rows, packed.columns])
    torch.autograd.backward(outputs, gradients)


def _scatter(
    scored: list[tuple[PackedPass, tuple[torch.Tensor, torch.Tensor]]], rows: int, width_T: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropies [rows, T], differentiable."""
    index = torch.cat([packed.rows * width_T + packed.columns for packed, _ in scored])
    results = []
    for values in zip(*(values for _, values in scored), strict=True):
        flat = torch.cat([v[p.next_ids[0] != -100] for (p, _), v in zip(scored, values, strict=True)])
        results.append(flat.new_zeros(rows * width_T).index_put((index,), flat).view(rows, width_T))
    return results[0], results[1]
