"""Work shared by ranks: actions on rank 0, and parameters that FSDP2 or ZeRO-3 shards.

FSDP2 makes a parameter a DTensor, of which a rank holds its shard. A parameter under ZeRO-3 is an ordinary one, empty
except while it is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from shared.errors import ErrorDetail, LockstepError

T = TypeVar("T")
#: Runs an action on rank 0; every rank gets its result, or raises its LockstepError. Collective.
OnMain = Callable[[Callable[[], Any]], Any]


def on_one_rank(action: Callable[[], Any]) -> Any:
    """Run `action`: `OnMain` for a single rank."""
    return action()


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank, and return all results on each; if it fails on one, all raise its error. Collective.

    Raises:
        LockstepError: of the first rank that raised one.
    """
    try:
        outcomes = gather_object([action()])
    except LockstepError as error:
        outcomes = gather_object([error.body().error])
    for outcome in outcomes:
        if isinstance(outcome, ErrorDetail):
            raise LockstepError.from_detail(outcome)
    return outcomes


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the unsharded parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Sequence[torch.Tensor], *, written: bool = False) -> Iterator[None]:
    """Gather parameters of ZeRO-3 on every rank for the block. Collective.

    Args:
        written: rank 0 changes them; every rank keeps its values.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if written else None):
        yield


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the unsharded tensor; under ZeRO-3 it must be `gathered`. Collective under FSDP2."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def overwrite(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, unsharded and the same on every rank, into `parameter`; under ZeRO-3 it must be `gathered`."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def reshard(model: nn.Module) -> None:
    """Reshard an FSDP2 model after a forward without backward, which leaves some modules gathered.

    Until then those modules hold copies: writes to them, and changes of `requires_grad`, are lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
