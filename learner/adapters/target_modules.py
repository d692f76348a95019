"""Check LoRA settings against the layers of a model, without loading its weights."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shared.errors import InvalidRequest
from shared.messages import one_line

logger = logging.getLogger("lockstep.adapters")


def check_target_modules(lora: LoraConfig, model_config: Any, *, trust_remote_code: bool = False) -> None:
    """Refuse target modules that the model does not have, and settings that PEFT refuses: `invalid_request`.

    Args:
        model_config: of transformers; a model is built of it on the meta device.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config), trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    except Exception as error:  # custom code may not know the meta device; loading the weights will tell
        logger.debug("target modules are checked once the model is loaded: %s", error)
        return
    missing = _missing(lora.target_modules, model)
    if missing:
        outputs = model.get_output_embeddings()
        linears = dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not outputs
        )
        raise InvalidRequest(
            f"lora_target_modules: the model has no {', '.join(missing)}; its linear layers are "
            f"{', '.join(linears)}, and all-linear stands for all of them"
        )
    trial = copy.deepcopy(lora)
    trial.init_lora_weights = False
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(trial, model)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise InvalidRequest(f"the LoRA settings do not fit the model: {one_line(error)}") from error


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
