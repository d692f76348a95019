"""Float32 copies of the weights that train: who keeps them, and how much of each step does not reach the adapter.

In 16 bits an update below half a unit in the last place of its weight vanishes. So the adapter itself is in float32,
also where TRL has put it into bfloat16 (over a quantized base). DeepSpeed keeps copies of its own: TRL leaves the
adapter in the base's dtype there, the optimizer updates the copy, and forwards, pushes and checkpoints use the copy,
rounded. Small updates add up in the copy until they move the adapter by one unit in its last place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel

from shared.errors import UnsupportedAdapter


def keep_master_weights(model: PeftModel) -> int:
    """Put trained 16-bit parameters into float32, before an optimizer has a state of them; return how many there were.

    Not for DeepSpeed, which keeps copies of its own and wants one dtype.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.itemsize == 2]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return len(parameters)


class RoundedUpdates:
    """Compares the adapter's steps with those of DeepSpeed's float32 copy of it.

    Args:
        model: the optimizer's.
        total: sums a tensor over all ranks; each rank compares its shard of the copy (ZeRO-3), or all of it.

    Raises:
        UnsupportedAdapter: parameters train in 16 bits without a copy.
    """

    def __init__(self, model: PeftModel, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._total = total
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32}
        bare = [name for name, p in trained.items() if not (hasattr(p, "ds_id") or hasattr(p, "get_full_hp_param"))]
        if bare:
            raise UnsupportedAdapter(
                f"{len(bare)} parameters train in {trained[bare[0]].dtype} without a float32 copy, {bare[0]} for one, "
                "so most of each update would be lost to rounding: leave the adapter in the float32 that attach "
                "puts it into"
            )
        self._parameters = list(trained.values())
        self._before = self._copies()

    def last_lost(self) -> float | None:
        """Return ||e - d|| / ||d|| of the step since the last call, d the copy's and e the adapter's; 0: nothing lost.

        None if the optimizer updates the adapter itself, or the copy has not moved. Collective.
        """
        if not self._parameters:
            return None
        before, self._before = self._before, self._copies()
        squares_2 = torch.zeros(2, device=self._before[0].device)  # moved, lost
        for parameter, old, new in zip(self._parameters, before, self._before, strict=True):
            meant = new - old
            made = new.to(parameter.dtype).float() - old.to(parameter.dtype).float()
            squares_2 += torch.stack([meant.square().sum(), (made - meant).square().sum()])
        moved, lost = self._total(squares_2).tolist()
        return (lost / moved) ** 0.5 if moved else None

    def _copies(self) -> list[torch.Tensor]:
        """Return each parameter's copy, float32: of ZeRO-3 this rank's shard, 1-D; of ZeRO-1 and 2 all of it."""
        if not self._parameters:
            return []
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        return [
            (safe_get_local_fp32_param if hasattr(p, "ds_id") else safe_get_full_fp32_param)(p).detach().clone()
            for p in self._parameters
        ]
