"""Refuse what cannot be trained, at the start and with what to do instead. No model is loaded, no request is made."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftModel
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from learner.adapters.lora_rules import caps_logits
from learner.config import LearnerConfig, slots_needed
from learner.tasks.arguments import reads
from learner.tasks.base import REWARD_ARGUMENTS
from learner.trainer.prompt_order import indexable, rows_of_rank
from learner.trainer.reward_hooks import all_known_early
from learner.trainer.sampling import generation_kwargs, refuse_unmapped, sampling_params
from shared.errors import InvalidRequest, UnsupportedAdapter
from shared.sampling import LEAST_TEMPERATURE
from shared.weights import ServerState

#: vLLM rules tokens out by these before any probability is computed, and says nothing of the mass they had.
HIDDEN_CUTS = ("allowed_token_ids", "bad_words", "min_tokens", "structured_outputs")
#: These reweight all tokens: the server's logprobs are those of the distribution that results.
REWEIGHTING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")

#: Where infinity is a bound that is never reached.
MAY_BE_INFINITE = (
    *("max_grad_norm", "epsilon", "epsilon_high", "delta", "off_policy_mask_threshold"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap", "entropy_coef_max", "vllm_server_timeout"),
)


def check_finite(args: GRPOConfig) -> None:
    """Refuse NaN, and infinity where it is not just no bound: `invalid_request`."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for number in parts:
            is_bound = field.name in MAY_BE_INFINITE and number == math.inf
            if isinstance(number, float) and not math.isfinite(number) and not is_bound:
                raise InvalidRequest(f"{field.name} {number}: give a finite number")


def check_grpo(args: GRPOConfig) -> list[str]:
    """Refuse generation options that cannot be honored; see `learner.trainer.sampling`.

    Returns:
        A warning where samples are of another distribution than the policy's.

    Raises:
        LockstepError: `invalid_request`.
    """
    check_finite(args)
    refuse_unmapped(args)
    if generation_kwargs(args).get("temperature", args.temperature) == 0.0:
        raise InvalidRequest("temperature=0 makes all completions of a group the same, so nothing is learned: raise it")
    sampling = sampling_params(args)
    chosen = sampling.model_dump(exclude_defaults=True)
    cuts = [name for name in HIDDEN_CUTS if name in chosen]
    # Where TRL compares logprobs of server and trainer, they must be of one distribution.
    compares = args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None
    if compares and cuts:
        raise InvalidRequest(
            f"{cuts[0]} rules out tokens by a mass that the server cannot return, which would bias the importance "
            f"correction: leave {cuts[0]} out, or set vllm_importance_sampling_correction=false (and no "
            "off_policy_mask_threshold)"
        )
    if args.max_completion_length is None and args.loss_type == "dr_grpo":
        raise InvalidRequest("loss_type=dr_grpo divides by max_completion_length, which is not set: set it")
    if args.accelerator_config.dispatch_batches:
        raise InvalidRequest(
            "accelerator_config.dispatch_batches: only tensors can be dispatched, and prompts are text; leave it out"
        )
    if args.push_to_hub:
        raise InvalidRequest(
            "push_to_hub would upload output_dir with the run's secret in it: push the adapter afterwards"
        )
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise InvalidRequest(
            f"max_steps={args.max_steps}, num_train_epochs={args.num_train_epochs:g}: a training has at least one "
            "step; set max_steps to 1 or more, or to -1 and num_train_epochs above 0"
        )
    truncating = args.vllm_importance_sampling_mode in ("token_truncate", "token_mask")
    # TRL checks this in the constructor only where use_vllm is set there already.
    if args.loss_type == "vespo" and args.vllm_importance_sampling_correction and not truncating:
        raise InvalidRequest(
            "loss_type=vespo needs vllm_importance_sampling_mode=token_truncate or token_mask, "
            f"not {args.vllm_importance_sampling_mode}"
        )
    reweighting = [name for name in REWEIGHTING if name in chosen]
    if sampling.temperature != args.temperature:
        reweighting.append("generation_kwargs.temperature")
    if reweighting and compares:
        return [
            f"{', '.join(reweighting)}: completions are drawn from another distribution than the one being trained. "
            "The importance ratios account for it, so they lie far from 1 and many are clipped or dropped (see "
            "lockstep/drift_clipped)"
        ]
    if reweighting or cuts:
        return [
            f"{', '.join([*reweighting, *cuts])}: completions are drawn from another distribution than the one being "
            "trained, and vllm_importance_sampling_correction is off, so they are trained on as if they were the "
            "policy's"
        ]
    return []


def check_evaluated(args: GRPOConfig, rows: Any) -> None:
    """Check that an evaluation that is asked for has rows: of one data set, or of several in a dict.

    Raises:
        LockstepError: `invalid_request`.
    """
    asked = "eval_strategy" if args.eval_strategy != "no" else "eval_on_start" if args.eval_on_start else None
    parts = rows.values() if isinstance(rows, dict) else [rows]
    if asked and any(part is None or (hasattr(part, "__len__") and not len(part)) for part in parts):
        raise InvalidRequest(
            f"{asked}: there are no rows to evaluate on; hold some out (eval_size, or the trainer's eval_dataset), or "
            "leave it out"
        )


#: What TRL and transformers measure in every evaluation, beside what begins with a word of `_MEASURED_IN`.
_MEASURED = (
    *("loss", "reward", "reward_std", "frac_reward_zero_std", "num_tokens", "entropy", "kl", "policy_loss", "aux_loss"),
    *("entropy_coef", "cispo_clip_ratio", "runtime", "samples_per_second", "steps_per_second"),
)
_MEASURED_IN = ("rewards/", "completions/", "clip_ratio/", "sampling/", "tools/", "vespo/", "lockstep/")


def check_best_metric(args: GRPOConfig, rewards: Iterable[Callable[..., Any]]) -> None:
    """Refuse a metric for the best model that no evaluation has, where no reward function logs metrics of its own.

    Raises:
        LockstepError: `invalid_request`.
    """
    asked = args.metric_for_best_model
    if args.eval_strategy == "no" or asked is None or any(reads(function, "log_metric") for function in rewards):
        return
    name = asked.removeprefix("eval_")
    if name not in _MEASURED and not name.startswith(_MEASURED_IN):
        near = difflib.get_close_matches(name, _MEASURED, n=1)
        hint = f"did you mean eval_{near[0]}?" if near else f"it has eval_{', eval_'.join(_MEASURED[:3])} ..."
        raise InvalidRequest(f"metric_for_best_model {asked}: no evaluation measures it; {hint}")


def check_callable(rewards: Iterable[Callable[..., Any]], columns: Iterable[str]) -> None:
    """Refuse reward functions that cannot be called as TRL does without environments: `invalid_request`."""
    given = dict.fromkeys([*REWARD_ARGUMENTS, *columns])
    names = [name for name in given if name not in ("prompt", "completion", "environments")]
    for function in rewards:
        try:
            # What stands before a function, as with functools.wraps, may take more than it passes on.
            signature = None if isinstance(function, nn.Module) else inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):  # builtins have none
            continue
        try:
            if signature:
                signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            name = getattr(function, "__name__", type(function).__name__)
            raise InvalidRequest(
                f"the reward {name!r} cannot be called: {error}. It is called with {', '.join(names)}, by name: add "
                "**_ for those that it does not read"
            ) from error


def draws_policy(args: GRPOConfig) -> bool:
    """Return whether the logprobs that come with completions are the policy's, up to truncation that is known."""
    sampling = sampling_params(args)
    chosen = sampling.model_dump(exclude_defaults=True)
    return sampling.temperature == args.temperature >= LEAST_TEMPERATURE and not any(
        name in chosen for name in (*HIDDEN_CUTS, *REWEIGHTING)
    )


def check_compiled(args: GRPOConfig, config: LearnerConfig) -> list[str]:
    """Return a warning where a training is compiled again and again."""
    if not (args.torch_compile and config.packed_passes):
        return []
    return [
        "torch_compile compiles packed passes again in every step, which takes far longer than it saves: leave it out; "
        "decoder layers are compiled where that pays (compile=auto)"
    ]


def check_corrected(args: GRPOConfig, config: LearnerConfig) -> None:
    """Check that something of TRL's accounts for stale samples: the importance correction, or its off-policy mask.

    Raises:
        LockstepError: `invalid_request`.
    """
    bounded = args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None
    if config.max_staleness and not bounded:
        raise InvalidRequest(
            f"max_staleness={config.max_staleness} with vllm_importance_sampling_correction=false trains on samples of "
            "older weights as if they were the present policy's: leave the correction on, or set "
            "off_policy_mask_threshold, or max_staleness=0"
        )


def check_known_ahead(trainer: GRPOTrainer, config: LearnerConfig) -> None:
    """Check that prompts and rewards are known early enough for `max_staleness` and `drop_degenerate_groups`.

    Raises:
        LockstepError: `invalid_request`.
    """
    why = None
    if not indexable(trainer):
        why = "the training data is a stream, whose prompts are not known ahead"
    elif trainer.environment_factories is not None or trainer.rollout_func is not None:
        why = "environments and rollout functions make their prompts when they are generated"
    if config.max_staleness and why:
        raise InvalidRequest(f"max_staleness: {why}; leave it at 0")
    rows = len(rows_of_rank(trainer))
    why = None
    if not all_known_early(trainer):
        why = "rewards must be known as completions arrive: no reward models, tools, environments or rollout functions"
    elif rows % trainer.num_generations:
        why = (
            f"groups of {trainer.num_generations} straddle ranks of {rows} rows each; let the batch size per device "
            "times gradient_accumulation_steps be a multiple of num_generations"
        )
    elif not indexable(trainer):
        why = "the training data is a stream, of which no other rows are known"
    if config.drop_degenerate_groups and why:
        raise InvalidRequest(f"drop_degenerate_groups: {why}")


#: Sampling parameters that an agent's own requests set.
_OF_REQUESTS = ("stop", "seed", "structured_outputs")


def check_agent(trainer: GRPOTrainer, args: GRPOConfig, config: LearnerConfig) -> None:
    """Refuse options that mean nothing, or cannot be kept, where agents make the completions.

    Raises:
        LockstepError: `invalid_request`.
    """
    why = {
        "tools": trainer.tools and trainer.environment_factories is None and "the agent calls its own",
        "environment": trainer.environment_factories is not None and "the agent has its own",
        "rollout_func": trainer.rollout_func is not None and "the agent makes the rollouts",
        "deterministic": config.deterministic and "what an agent asks and when is its own, and so are its seeds",
        "drop_degenerate_groups": config.drop_degenerate_groups and "rewards are known with the last episode only",
        "mask_truncated_completions": args.mask_truncated_completions
        and "TRL looks at a row's last token, which need not be the last call's; the agent sees which calls were cut "
        "off (finish_reason), and may reward them so",
    }
    for name, reason in why.items():
        if reason:
            raise InvalidRequest(f"{name} with an agent: {reason}; leave it out")
    chosen = sampling_params(args).model_dump(exclude_defaults=True)
    if found := [name for name in _OF_REQUESTS if name in chosen]:
        raise InvalidRequest(f"{found[0]} with an agent: set it in the agent's requests, which decide on it")


def check_attention(model: PeftModel) -> None:
    """Refuse a loaded model whose attention leaves out what the server computes: `unsupported_adapter`."""
    config = model.get_base_model().config.get_text_config()
    if caps_logits(config) and config._attn_implementation == "sdpa":
        raise UnsupportedAdapter(
            f"{config.model_type} caps its attention logits, which attn_implementation='sdpa' leaves out and the "
            "server does not: load the model with attn_implementation='eager' (learner train does by itself)"
        )


def check_slots(args: GRPOConfig, state: ServerState, config: LearnerConfig) -> None:
    """Check that no push has to wait for a slot.

    Raises:
        LockstepError: `invalid_request`.
    """
    if not config.max_staleness or config.in_flight != "drain" or state.apply == "merge":
        return
    needed = slots_needed(
        config.max_staleness,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    if state.slots_per_run < needed:
        raise InvalidRequest(
            f"max_staleness={config.max_staleness}: a rollout can live through {needed - 1} pushes, and the server has "
            f"only {state.slots_per_run} adapter slots: start it with --slots-per-run {needed}, or set in_flight=keep"
        )
