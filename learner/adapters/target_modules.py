"""Check LoRA settings against the layers of a model, without loading its weights."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import warnings
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from learner.adapters.lora_rules import check_targets, is_of_experts, outside_language_model, unused_patterns
from shared.errors import InvalidRequest
from shared.messages import one_line
from shared.module_names import encoders

logger = logging.getLogger("lockstep.adapters")

_OF_MLPS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")


def model_class(model_config: Any) -> Any:
    """Return transformers' class for a model, as TRL chooses it: the one that the checkpoint names."""
    name = (getattr(model_config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    return getattr(transformers, name, AutoModelForCausalLM)


def check_target_modules(
    lora: LoraConfig, model_config: Any, *, trust_remote_code: bool = False, is_given: bool = False
) -> LoraConfig:
    """Refuse target modules that the model does not have, and settings that PEFT refuses: `invalid_request`.

    Raises `unsupported_adapter` for experts, routers and encoders.

    Args:
        model_config: of transformers; a model is built of it on the meta device.
        is_given: the settings are those of an adapter that is there already, which may have patterns without effect.

    Returns:
        The settings. Where the model has encoders of images or sound, `exclude_modules` takes out all but the language
        model: all-linear, and names that its layers share with an encoder's, mean the former. In a mixture of experts
        all-linear means all linear layers outside MLPs.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = _without_weights(copy.deepcopy(model_config), trust_remote_code)
    except Exception as error:  # custom code may not know the meta device; loading the weights will tell
        logger.debug("target modules are checked once the model is loaded: %s", error)
        return lora
    modules, outputs = dict(model.named_modules()), model.get_output_embeddings()
    adaptable, outside = list(modules), ""
    if encoders(model_config):
        outside = outside_language_model(next((name for name, module in modules.items() if module is outputs), None))
        adaptable = [name for name in modules if not re.fullmatch(outside, name)]
    experts = [name for name in adaptable if is_of_experts(name)]
    left_out = {*_OF_MLPS, *map(_last_part, experts)} if experts else set()
    linears = dict.fromkeys(
        _last_part(name)
        for name in adaptable
        if isinstance(modules[name], nn.Linear | Conv1D)
        and modules[name] is not outputs
        and not is_of_experts(name)
        and _last_part(name) not in left_out
    )
    is_pattern = isinstance(lora.target_modules, str) and lora.target_modules != "all-linear"
    missing = _missing(lora.target_modules, list(modules) if is_pattern else adaptable)
    if missing:
        where = " outside MLPs" if experts else ""
        raise InvalidRequest(
            f"lora_target_modules: the model has no {', '.join(missing)}; its linear layers{where} are "
            f"{', '.join(linears)}, and all-linear stands for all of them"
        )
    try:
        if lora.target_modules == "all-linear" and (outside or experts):
            lora = dataclasses.replace(lora, target_modules=list(linears))
        if outside and not is_pattern:
            lora = dataclasses.replace(lora, exclude_modules=_either(lora.exclude_modules, outside))
        if lora.target_modules is not None:  # else PEFT chooses
            # Of experts and routers PEFT would say that it does not know their classes.
            check_targets((n for n in modules if check_target_module_exists(lora, n)), mixture_of_experts=True)
        adapted = _adapted(lora, model)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        reason = one_line(error).rstrip(".")
        if experts:  # PEFT takes names for theirs that are so in files only, also where other layers have them
            reason += f"; name layers outside MLPs, whose names PEFT may take for the experts': {', '.join(linears)}"
        raise InvalidRequest(f"the LoRA settings do not fit the model: {reason}") from error
    if not is_given and (unused := unused_patterns(lora, adapted)):
        raise InvalidRequest(f"lora_kwargs.{unused[0]}")
    check_targets(adapted, mixture_of_experts=True)
    return lora


def _without_weights(model_config: Any, trust_remote_code: bool) -> nn.Module:
    kind = model_class(model_config)
    if kind is AutoModelForCausalLM:
        made = kind.from_config(model_config, trust_remote_code=trust_remote_code, attn_implementation="eager")
    else:
        made = kind(model_config)
    return cast(nn.Module, made)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _either(excluded: str | set[str] | list[str] | None, pattern: str) -> str:
    """Return `exclude_modules` for what `excluded` takes, as PEFT compares, and what `pattern` does."""
    if not excluded:
        return pattern
    if not isinstance(excluded, str):
        excluded = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})"
    return f"(?:{excluded})|{pattern}"


def _adapted(lora: LoraConfig, model: nn.Module) -> list[str]:
    """Return the names of the modules that PEFT adapts, of a model that is used for nothing else."""
    trial = copy.deepcopy(lora)
    trial.init_lora_weights = False
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        inject_adapter_in_model(trial, model)
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _missing(targets: str | set[str] | list[str] | None, names: list[str]) -> list[str]:
    """Return which of `targets` is none of `names`, as PEFT compares: ends of names, or one regular expression."""
    if targets is None or targets == "all-linear":
        return []
    if isinstance(targets, str):
        try:
            return [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise InvalidRequest(f"lora_target_modules: {targets!r} is no regular expression: {error}") from error
    return sorted(target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names))
