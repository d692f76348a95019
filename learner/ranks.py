"""What several ranks do together: let rank 0 act for all, and read and write what FSDP2 spreads over them."""

from __future__ import annotations

from collections.abc import Callable
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of `tensor`, on every rank. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def overwrite(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, which every rank holds as a whole, into `parameter`, of which each rank may keep a part only."""
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
