"""Make, of one number, what transformers makes of a training's settings when it begins: what it would refuse is known.

No model is loaded, no request is made.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from trl import GRPOConfig

from shared.errors import InvalidRequest
from shared.messages import one_line

#: Schedules whose steps take a metric.
_OF_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
#: Schedules without settings: `get_scheduler` drops what it is given.
_PLAIN = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


def rehearse(args: GRPOConfig) -> None:
    """Refuse settings that a training would fail with once it begins, after servers were awaited: `invalid_request`."""
    _refuse(
        f"optim {args.optim.value}, or its settings (optim_args, adam_beta1, adam_beta2, adam_epsilon)", _optimize, args
    )
    schedule = SchedulerType(args.lr_scheduler_type).value
    _refuse(f"lr_scheduler_kwargs, or lr_scheduler_type {schedule}", _schedule, args)
    _refuse("dataloader_num_workers, or other settings of dataloaders", _load_data, args)
    if args.gradient_checkpointing:
        _refuse("gradient_checkpointing_kwargs", _checkpoint_gradients, args)


def _refuse(options: str, make: Callable[[GRPOConfig], object], args: GRPOConfig) -> None:
    try:
        make(args)
    except Exception as error:  # of torch and transformers, of any kind
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        raise InvalidRequest(f"{options}: {kind}{one_line(error)}") from error


def _number() -> torch.Tensor:
    return torch.zeros(1, requires_grad=True)


def _optimize(args: GRPOConfig) -> None:
    pairs = [pair for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    if any("=" not in pair for pair in pairs):
        raise ValueError(f"{args.optim_args!r} is not written as name=value,name=value")
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        if "need to pass a" in str(error):  # an optimizer that looks at the model, which is not here
            return
        raise
    if ignored := [name for name in (pair.partition("=")[0] for pair in pairs) if not _is_read(name, args)]:
        known = [name for name in inspect.signature(kind).parameters if _is_read(name, args)]
        raise ValueError(
            f"transformers ignores {', '.join(ignored)} in optim_args; with this optimizer it reads "
            f"{', '.join(known) or 'nothing from there'} (learning_rate, weight_decay, adam_beta1, adam_beta2 and "
            "adam_epsilon are options of their own)"
        )
    if is_optimizer_factory(kind):
        return
    try:
        kind([_number()], **settings)
    except RuntimeError:  # of one that wants a GPU's parameters
        return


def _is_read(name: str, args: GRPOConfig) -> bool:
    """Return whether transformers looks at `name` in `optim_args`: other values make another optimizer, or an error."""
    made, trial = list[Any](), copy.copy(args)
    for value in ("true", "0.5", ""):
        trial.optim_args = f"{name}={value}"
        try:
            made.append(Trainer.get_optimizer_cls_and_kwargs(trial))
        except (ValueError, TypeError, AttributeError):
            return True
    return any(one != made[0] for one in made)


def _schedule(args: GRPOConfig) -> None:
    if args.lr_scheduler_kwargs and args.lr_scheduler_type in _PLAIN:
        raise ValueError(f"{', '.join(args.lr_scheduler_kwargs)} has no effect on this schedule; leave it out")
    optimizer, steps = torch.optim.SGD([_number()], lr=1.0), 10
    # With both a warm-up and steps after it, since each reads other settings.
    scheduler: Any = get_scheduler(args.lr_scheduler_type, optimizer, 1, steps, args.lr_scheduler_kwargs)
    for _ in range(0 if args.lr_scheduler_type in _OF_METRICS else steps):
        optimizer.step()
        scheduler.step()
        if not math.isfinite(rate := scheduler.get_last_lr()[0]):
            raise ValueError(f"they make a learning rate of {rate}")


def _load_data(args: GRPOConfig) -> None:
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # of transformers 5.16
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _checkpoint_gradients(args: GRPOConfig) -> None:
    checkpoint(torch.clone, _number(), **{"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})})
