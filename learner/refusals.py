"""What cannot be trained or served, said at the start and with what to do instead.

Pure functions of configurations and of the server's state: no model is loaded and no request is made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from learner.quantised import check_quantised
from learner.sampling import generation_kwargs, refuse_unmapped, sampling_params
from shared.errors import (
    InvalidRequest,
    RankTooHigh,
    UnsupportedAdapter,
)
from shared.weights import ServerState

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import GRPOConfig

#: Initialisations that leave the base weights as they are.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

#: LoraConfig field -> what to do instead. Refused when set.
REFUSED_LORA_FIELDS = {
    "modules_to_save": "only the adapter travels to the server; leave modules_to_save out",
    "trainable_token_indices": "trained token embeddings cannot be served; leave trainable_token_indices out",
    "target_parameters": "name linear layers in target_modules instead",
    "layer_replication": "the server would have other layers than the learner; leave layer_replication out",
    "lora_bias": "the server applies no bias; leave lora_bias out",
    "use_dora": "the server cannot apply DoRA; set use_dora to false (use_rslora works)",
    "use_qalora": "set use_qalora to false",
    "alora_invocation_tokens": "the server applies the adapter to every token; leave this out",
    "megatron_config": "leave megatron_config out",
    "ensure_weight_tying": "adapters on tied embeddings cannot be served; leave ensure_weight_tying out",
}

_EXPERTS = re.compile(r"(^|\.)(experts|router|shared_expert|block_sparse_moe|gate)(\.|$)")
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|image_encoder)(\.|$)")


def check_lora(config: LoraConfig | None, adapter_type: str = "LORA") -> None:
    """Refuse everything but plain LoRA; rsLoRA, rank_pattern, alpha_pattern and subsets of layers are plain.

    Raises:
        LockstepError: `unsupported_adapter`.
    """
    if config is None:
        raise UnsupportedAdapter(
            "full fine-tuning cannot be served: only a LoRA adapter travels to the server. "
            "Set use_peft (and lora_r, lora_target_modules), or pass a peft_config to the trainer"
        )
    kind = getattr(getattr(config, "peft_type", None), "value", config.__class__.__name__)
    if kind != adapter_type:
        raise UnsupportedAdapter(f"a {kind} adapter cannot be served: use peft.LoraConfig")
    if config.bias != "none":
        raise UnsupportedAdapter(f"bias={config.bias!r}: trained biases cannot be served; set bias='none'")
    for name, instead in REFUSED_LORA_FIELDS.items():
        if getattr(config, name, None):
            raise UnsupportedAdapter(f"{name}={getattr(config, name)!r}: {instead}")
    init = config.init_lora_weights
    if init not in PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights={init!r} changes the base weights or the adapter's form, which the server "
            f"does not know; use one of {', '.join(map(repr, PLAIN_INITS))}"
        )
    # PEFT marks the fields that turn LoRA into something else; those of later versions are refused as well.
    for f in fields(config):
        if f.metadata.get("is_lora_variant") and getattr(config, f.name):
            raise UnsupportedAdapter(f"{f.name}: this variant of LoRA cannot be served; leave it out")


def check_rank(config: LoraConfig, state: ServerState) -> None:
    """The highest rank of any module fits into the server's slots.

    Raises:
        LockstepError: `rank_too_high`.
    """
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > state.max_lora_rank:
        raise RankTooHigh(
            f"the adapter's rank {rank} is above the server's {state.max_lora_rank}: lower lora_r "
            f"(rank_pattern), or start the server with --max-lora-rank {rank}"
        )


def check_targets(module_names: Iterable[str], *, mixture_of_experts: bool) -> None:
    """No adapter on vision parts, nor on experts or routers of a mixture of experts.

    Raises:
        LockstepError: `unsupported_adapter`.
    """
    for name in module_names:
        if _VISION.search(name):
            raise UnsupportedAdapter(f"{name} belongs to a vision encoder; take it out of target_modules")
        if mixture_of_experts and _EXPERTS.search(name):
            raise UnsupportedAdapter(f"{name} belongs to a mixture of experts; target the attention layers only")


def check_model(model_config: Any) -> None:
    """A text model, whole or in four bits; models with a vision or audio part are not supported yet.

    Raises:
        LockstepError: `unsupported_adapter`.
    """
    for part in ("vision_config", "audio_config"):
        if getattr(model_config, part, None) is not None:
            raise UnsupportedAdapter(f"{model_config.model_type} has a {part}: only text models are supported")
    check_quantised(model_config)


def check_grpo(args: GRPOConfig) -> None:
    """Generation options that cannot be honoured; see `learner.sampling`.

    Raises:
        LockstepError: `invalid_request`.
    """
    refuse_unmapped(args)
    if generation_kwargs(args).get("temperature", args.temperature) == 0.0:
        raise InvalidRequest("temperature=0 makes all completions of a group the same, so nothing is learned: raise it")
    check_correction(args)
    if args.push_to_hub:
        raise InvalidRequest(
            "push_to_hub would upload output_dir with the run's secret in it: push the adapter afterwards"
        )
    truncating = args.vllm_importance_sampling_mode in ("token_truncate", "token_mask")
    # TRL checks this in the constructor only where use_vllm is set there already.
    if args.loss_type == "vespo" and args.vllm_importance_sampling_correction and not truncating:
        raise InvalidRequest(
            "loss_type=vespo needs vllm_importance_sampling_mode=token_truncate or token_mask, "
            f"not {args.vllm_importance_sampling_mode}"
        )


#: vLLM rules tokens out by these before any probability is computed, and says nothing of the mass they had.
HIDDEN_CUTS = ("allowed_token_ids", "bad_words", "min_tokens", "structured_outputs")
#: These reweight all tokens: the server's logprobs are those of the distribution that results.
REWEIGHTING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
#: vLLM raises lower temperatures to this.
LEAST_TEMPERATURE = 0.01


def check_correction(args: GRPOConfig) -> None:
    """Where TRL compares the server's logprobs with its own, both must be of one distribution.

    Raises:
        LockstepError: `invalid_request`.
    """
    if not _compares_logprobs(args):
        return
    for name in _set_options(args, HIDDEN_CUTS):
        raise InvalidRequest(
            f"{name} rules out tokens by a mass that the server cannot return, which would bias the importance "
            f"correction: leave {name} out, or set vllm_importance_sampling_correction=false (and no "
            "off_policy_mask_threshold)"
        )
    if 0 < sampling_params(args).temperature < LEAST_TEMPERATURE:
        raise InvalidRequest(f"the server samples at temperature {LEAST_TEMPERATURE} or above: raise temperature")


def correction_warnings(args: GRPOConfig) -> list[str]:
    """What is trained on although it was drawn from another distribution than the policy's, each with its effect."""
    sampling, compares = sampling_params(args), _compares_logprobs(args)
    warnings = []
    reweighting = _set_options(args, REWEIGHTING)
    if sampling.temperature != args.temperature:
        reweighting.append("generation_kwargs.temperature")
    if reweighting and compares:
        warnings.append(
            f"{', '.join(reweighting)}: completions are drawn from another distribution than the one being trained. "
            "The importance ratios account for it, so they lie far from 1 and many are clipped or dropped (see "
            "lockstep/drift_clipped)"
        )
    uncorrected = [*reweighting, *_set_options(args, HIDDEN_CUTS)]
    if uncorrected and not compares:
        warnings.append(
            f"{', '.join(uncorrected)}: completions are drawn from another distribution than the one being trained, "
            "and vllm_importance_sampling_correction is off, so they are trained on as if they were the policy's"
        )
    return warnings


def _compares_logprobs(args: GRPOConfig) -> bool:
    return args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None


def _set_options(args: GRPOConfig, names: Iterable[str]) -> list[str]:
    """Those of the sampling options that are not at their default."""
    chosen = sampling_params(args).model_dump(exclude_defaults=True)
    return [name for name in names if name in chosen]
