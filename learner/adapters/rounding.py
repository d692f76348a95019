"""How much of each optimizer step is lost to rounding under DeepSpeed ZeRO-3.

TRL leaves the adapter in the base's dtype there, usually bfloat16. The optimizer updates a float32 copy; forwards,
pushes and checkpoints use that copy, rounded. Small updates add up in the copy until they move the adapter by one unit
in its last place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel


class RoundedUpdates:
    """Compares the adapter's steps with those of ZeRO-3's float32 copy of it.

    Args:
        model: the optimizer's.
        total: sums a tensor over all ranks; each rank compares its shard of the copy.
    """

    def __init__(self, model: PeftModel, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._total = total
        trained = (p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id"))
        self._parameters = [parameter for parameter in trained if parameter.dtype != torch.float32]
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
        """Return this rank's shard of each parameter's copy, 1-D, float32."""
        if not self._parameters:
            return []
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(parameter).detach().clone() for parameter in self._parameters]
