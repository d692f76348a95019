"""Check LoRA settings against the layers of a model, without loading its weights."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from learner.adapters.lora_rules import is_of_experts
from shared.errors import InvalidRequest
from shared.messages import one_line
from shared.module_names import LANGUAGE_MODELS, encoders, is_of_encoder

logger = logging.getLogger("lockstep.adapters")

_OF_MLPS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")


def model_class(model_config: Any) -> Any:
    """Return transformers' class for a model, as TRL chooses it: the one that the checkpoint names."""
    name = (getattr(model_config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    return getattr(transformers, name, AutoModelForCausalLM)


def check_target_modules(lora: LoraConfig, model_config: Any, *, trust_remote_code: bool = False) -> LoraConfig:
    """Refuse target modules that the model does not have, and settings that PEFT refuses: `invalid_request`.

    Args:
        model_config: of transformers; a model is built of it on the meta device.

    Returns:
        The settings. Where the model has encoders of images or sound, `target_modules` is a pattern for the linear
        layers of its language model alone: all-linear, and names that these share with an encoder, mean those. In a
        mixture of experts all-linear means all layers outside MLPs.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = _without_weights(copy.deepcopy(model_config), trust_remote_code)
    except Exception as error:  # custom code may not know the meta device; loading the weights will tell
        logger.debug("target modules are checked once the model is loaded: %s", error)
        return lora
    outputs = model.get_output_embeddings()
    linears = dict.fromkeys(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not outputs
        and not is_of_encoder(name)
        and not is_of_experts(name)
    )
    missing = _missing(lora.target_modules, model)
    if missing:
        raise InvalidRequest(
            f"lora_target_modules: the model has no {', '.join(missing)}; its linear layers are "
            f"{', '.join(linears)}, and all-linear stands for all of them"
        )
    if encoders(model_config) and (wanted := _wanted(lora.target_modules, list(linears))):
        lora = dataclasses.replace(lora, target_modules=language_pattern(wanted))
    elif lora.target_modules == "all-linear" and any(is_of_experts(name) for name, _ in model.named_modules()):
        # PEFT takes the names of their layers for experts, whose files have these names, also where others have them.
        lora = dataclasses.replace(lora, target_modules=[name for name in linears if name not in _OF_MLPS])
    trial = copy.deepcopy(lora)
    trial.init_lora_weights = False
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(trial, model)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise InvalidRequest(f"the LoRA settings do not fit the model: {one_line(error)}") from error
    return lora


def language_pattern(names: Iterable[str]) -> str:
    """Return `target_modules` that takes modules of these names in the language model of a multimodal model.

    Example:
        assert re.fullmatch(language_pattern(["q_proj"]), "model.language_model.layers.0.self_attn.q_proj")
    """
    parents, ends = "|".join(LANGUAGE_MODELS), "|".join(map(re.escape, sorted(names)))
    return rf"(?:.*\.)?(?:{parents})\.(?:.*\.)?(?:{ends})"


def _without_weights(model_config: Any, trust_remote_code: bool) -> nn.Module:
    kind = model_class(model_config)
    if kind is AutoModelForCausalLM:
        made = kind.from_config(model_config, trust_remote_code=trust_remote_code, attn_implementation="eager")
    else:
        made = kind(model_config)
    return cast(nn.Module, made)


def _wanted(targets: str | set[str] | list[str] | None, linears: list[str]) -> list[str]:
    """Return the ends of the names that `targets` stands for; none where it is a regular expression, which stays."""
    if targets == "all-linear":
        return linears
    return [] if targets is None or isinstance(targets, str) else list(targets)


def _missing(targets: str | set[str] | list[str] | None, model: nn.Module) -> list[str]:
    """Return which of `targets` no module is called, as PEFT compares: ends of names, or one regular expression."""
    if targets is None or targets == "all-linear":
        return []
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            return [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise InvalidRequest(f"lora_target_modules: {targets!r} is no regular expression: {error}") from error
    return sorted(target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names))
