"""LoRA training that a server can serve exactly: rules for the adapter, its rank and targets, and the base model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from learner.adapters.quantization import check_quantization
from shared.errors import RankTooHigh, UnsupportedAdapter
from shared.module_names import LANGUAGE_MODELS, is_of_encoder
from shared.weights import SERVED_RANKS, ServerState, served_rank

if TYPE_CHECKING:
    from peft import LoraConfig

#: Initializations that leave the base weights unchanged.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
#: LoraConfig fields that are refused when set -> what to do instead.
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
#: All tokens pass a shared expert, but its gate is a part of the routing.
_EXPERTS = re.compile(r"(^|\.)(experts|router|shared_expert_gate|block_sparse_moe|gate)(\.|$)")


def check_lora(config: LoraConfig | None) -> None:
    """Refuse everything but plain LoRA (with rsLoRA, patterns, or subsets of layers, too): `unsupported_adapter`."""
    if config is None:
        raise UnsupportedAdapter(
            "full fine-tuning cannot be served: only a LoRA adapter travels to the server. "
            "Set use_peft (and lora_r, lora_target_modules), or pass a peft_config to the trainer"
        )
    kind = getattr(getattr(config, "peft_type", None), "value", config.__class__.__name__)
    if kind != "LORA":
        raise UnsupportedAdapter(f"a {kind} adapter cannot be served: use peft.LoraConfig")
    if config.bias != "none":
        raise UnsupportedAdapter(f"bias={config.bias!r}: trained biases cannot be served; set bias='none'")
    for name, instead in REFUSED_LORA_FIELDS.items():
        if getattr(config, name, None):
            raise UnsupportedAdapter(f"{name}={getattr(config, name)!r}: {instead}")
    for where, alpha in (("lora_alpha", config.lora_alpha), *(config.alpha_pattern or {}).items()):
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UnsupportedAdapter(f"{where} {alpha!r}: give a finite number")
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


def unused_patterns(config: LoraConfig, module_names: Iterable[str]) -> list[str]:
    """Return, one line each, which names of rank_pattern and alpha_pattern are of none of the adapted modules."""
    names, found = list(module_names), []
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern or {}:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):  # as PEFT compares
                kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
                found.append(f"{field}: no adapted layer is called {key!r}; there are {', '.join(kinds)}")
    return found


def check_rank(config: LoraConfig, state: ServerState) -> None:
    """Refuse an adapter whose highest rank does not fit into the server's slots: `rank_too_high`."""
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > state.max_lora_rank:
        if rank > SERVED_RANKS[-1]:
            raise RankTooHigh(
                f"no server serves an adapter of rank {rank}: lower lora_r (rank_pattern) to {SERVED_RANKS[-1]}"
            )
        raise RankTooHigh(
            f"the adapter's rank {rank} is above the server's {state.max_lora_rank}: lower lora_r "
            f"(rank_pattern), or start the server with --max-lora-rank {served_rank(rank)}"
        )


def language_pattern(names: Iterable[str]) -> str:
    """Return `target_modules` that takes modules whose names end so, in the language model of a multimodal model.

    Example:
        assert re.fullmatch(language_pattern(["q_proj"]), "model.language_model.layers.0.self_attn.q_proj")
    """
    parents, ends = "|".join(LANGUAGE_MODELS), "|".join(map(re.escape, sorted(names)))
    return rf"(?=(?:.*\.)?(?:{parents})\.)(?:.*\.)?(?:{ends})"


def outside_language_model(head: str | None) -> str:
    """Return `exclude_modules` that takes all modules of a multimodal model but the language model's, and its `head`.

    Example:
        assert re.fullmatch(outside_language_model("lm_head"), "model.visual.blocks.0.attn.qkv")
        assert not re.fullmatch(outside_language_model("lm_head"), "model.language_model.layers.0.self_attn.q_proj")
    """
    kept = [rf"(?:.*\.)?(?:{'|'.join(LANGUAGE_MODELS)})\.", *([re.escape(head) + "$"] if head else [])]
    return f"(?!{'|'.join(kept)}).*"


def check_targets(module_names: Iterable[str], *, mixture_of_experts: bool) -> None:
    """Refuse adapters on vision parts, and on experts or routers: `unsupported_adapter`."""
    names = list(module_names)
    for name in names:
        if is_of_encoder(name):
            ends = {other.rpartition(".")[2] for other in names if not is_of_encoder(other)}
            raise UnsupportedAdapter(
                f"{name} belongs to an encoder of images or sound, which the server does not adapt: target_modules "
                f"'{language_pattern(ends or ('q_proj', 'v_proj'))}' takes layers of the language model only"
            )
        if mixture_of_experts and is_of_experts(name):
            raise UnsupportedAdapter(
                f"{name} belongs to the experts of a mixture, or routes to them: name attention layers in "
                "target_modules (q_proj, k_proj, v_proj, o_proj), or all-linear, which means all layers outside MLPs"
            )


def is_of_experts(name: str) -> bool:
    """Return whether a module belongs to the experts of a mixture, or routes to them."""
    return _EXPERTS.search(name) is not None


def check_model(model_config: Any) -> None:
    """Refuse inexact quantization: `unsupported_adapter`."""
    check_quantization(model_config)


def caps_logits(model_config: Any) -> bool:
    """Return whether a model's attention logits are capped (Gemma 2), which transformers' sdpa ignores."""
    return bool(getattr(model_config.get_text_config(), "attn_logit_softcapping", None))
