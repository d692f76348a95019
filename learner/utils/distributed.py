"""What several ranks do together: let rank 0 act for all, and read and write what FSDP2 or ZeRO-3 spreads over them.

A parameter of FSDP2 is a DTensor, of which a rank holds its part. One of ZeRO-3 is an ordinary parameter that is empty
but for when it is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

#: Runs an action on rank 0; every rank gets its result, or raises its LockstepError. Collective.
OnMain = Callable[[Callable[[], Any]], Any]


def on_one_rank(action: Callable[[], Any]) -> Any:
    """`OnMain` where there is only one rank."""
    return action()


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """Its shape as a whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Sequence[torch.Tensor], *, written: bool = False) -> Iterator[None]:
    """Within it parameters of ZeRO-3 are whole on every rank, and `written` alike on all of them. Collective."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if written else None):
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of `tensor`, on every rank; one of ZeRO-3 has to be gathered. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def overwrite(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, which every rank holds as a whole, into `parameter`, of which each rank may keep a part only.

    A parameter of ZeRO-3 has to be gathered.
    """
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def reshard(model: nn.Module) -> None:
    """Spread `model` again after a forward without backward, which leaves parameters of some modules gathered.

    Until then those modules hold copies: what is written there is lost, and `requires_grad` set there does not last.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
