"""Randomness of training passes: what trains is then another network than the one that is served and proven."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOConfig

from shared.messages import one_line

logger = logging.getLogger("lockstep.trainer")

#: Names of numbers that layers read while they train: dropout, layerdrop, drop_path, router_jitter_noise.
_NAMES = re.compile("drop|jitter|noise")
#: Read when a model is served, too: it would be another one without.
_ALSO_SERVED = {"router_jitter_noise"}
_PROBE_TOKENS = 16
#: Passes of one network differ by less, as a share of the spread of their logits; in 16 bits, by less than two steps.
_SAME, _STEPS = 1e-3, 2.0


def randomness(
    model: nn.Module, args: GRPOConfig, *, sharded: bool = False, most: Callable[[float], float] = lambda own: own
) -> dict[str, str]:
    """Return what makes two training passes of a PEFT model differ, each with what to do about it; empty: nothing.

    Dropout is a module in some models and a number that layers pass on in others, so a few tokens are scored twice
    besides, which shows what has another name.

    Args:
        sharded: no single process can compute a pass before training begins.
        most: returns the largest of all ranks' numbers, so that all find the same.
    """
    found: dict[str, str] = {}
    numbers: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            if module.p and "lora_dropout" in path:
                found[f"lora_dropout is {module.p:g}"] = "set lora_dropout=0, or disable_dropout=True in GRPOConfig"
            elif module.p:
                found[f"the base's dropout is {module.p:g}"] = "set disable_dropout=True in GRPOConfig"
            continue
        numbers |= {name: value for name, value in vars(module).items() if _is_strength(name, value)}
    config = model.get_base_model().config.get_text_config()
    if attention := getattr(config, "attention_dropout", 0.0):
        numbers["attention_dropout"] = attention
    for name, value in numbers.items():
        remedy = f"set {_without(config, name)} in GRPOConfig"
        if name in _ALSO_SERVED:
            remedy = "another number would change what the model computes when it is served; train another model"
        found[f"{name} is {value:g}"] = remedy
    if args.neftune_noise_alpha:
        found[f"neftune_noise_alpha is {args.neftune_noise_alpha:g}"] = "leave it out of GRPOConfig"
    if not found and not sharded and (difference := most(_difference(model))):
        found[f"something else makes the logits of two passes differ by {difference:.1g} of their spread"] = (
            "find out what, with the model in train() mode, and switch it off by model_init_kwargs in GRPOConfig"
        )
    return found


def as_warnings(found: dict[str, str]) -> list[str]:
    """Return a warning for each kind of `randomness`."""
    return [
        f"{what}: every training pass is of another, random network, so importance ratios and gradients are not of the "
        f"one that is served and proven: {remedy}"
        for what, remedy in found.items()
    ]


def _is_strength(name: str, value: object) -> bool:
    return isinstance(value, float) and 0.0 < value <= 1.0 and _NAMES.search(name) is not None


def _without(config: object, name: str) -> str:
    """Return the settings of the model that switch a number of its layers off: that of its name, or all of the kind."""
    settings = [name] if hasattr(config, name) else [n for n, v in vars(config).items() if _is_strength(n, v)]
    return f"model_init_kwargs={{{', '.join(f'{setting!r}: 0.0' for setting in settings or [name])}}}".replace("'", '"')


def _difference(model: nn.Module) -> float:
    """Return how far the logits of two training passes over the same tokens differ, as a share of their spread."""
    base: PreTrainedModel = model.get_base_model()
    device, modes = base.device, {module: module.training for module in model.modules()}
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device)[None] % base.get_input_embeddings().weight.size(0)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            model.train()
            first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    except Exception as error:  # of a model that needs more than tokens, of any kind
        logger.info("whether training passes are random cannot be tried: %s", one_line(error))
        return 0.0
    finally:
        for module, mode in modes.items():
            module.training = mode
    difference = float((first.float() - second.float()).std() / first.float().std())
    return difference if difference > max(_SAME, _STEPS * torch.finfo(first.dtype).eps) else 0.0
