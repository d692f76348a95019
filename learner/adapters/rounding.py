"""How much of each optimizer step is lost where the adapter is coarser than what the optimizer keeps of it.

Under DeepSpeed ZeRO-3 TRL leaves the adapter in the base's dtype, bfloat16 as a rule. The optimizer adds its updates to
a float32 copy, and what is computed with, pushed and saved is that copy, rounded. Small updates do not show at once:
they add up in the copy until they move the adapter by a whole unit in its last place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel


class RoundedUpdates:
    """Compares the steps that the adapter makes with those of ZeRO-3's float32 copy of it.

    Args:
        model: of which the optimizer has been made.
        total: sum of a tensor over all ranks, each of which looks at its own part of the copy.
    """

    def __init__(self, model: PeftModel, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._total = total
        self._parameters = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and hasattr(parameter, "ds_id") and parameter.dtype != torch.float32
        ]
        self._before = self._copies()

    def last_lost(self) -> float | None:
        """||e - d|| / ||d|| of the step since the last call: d the copy's, e the adapter's; 0: it came as it was meant.

        None where the adapter is what the optimizer updates, or that has not moved. Collective.
        """
        if not self._parameters:
            return None
        before, self._before = self._before, self._copies()
        squares_2 = torch.zeros(2, device=self._before[0].device)  # moved, missed
        for parameter, old, new in zip(self._parameters, before, self._before, strict=True):
            meant = new - old
            made = new.to(parameter.dtype).float() - old.to(parameter.dtype).float()
            squares_2 += torch.stack([meant.square().sum(), (made - meant).square().sum()])
        moved, missed = self._total(squares_2).tolist()
        return (missed / moved) ** 0.5 if moved else None

    def _copies(self) -> list[torch.Tensor]:
        """This rank's part of the copy of each parameter, 1-D, float32."""
        if not self._parameters:
            return []
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(parameter).detach().clone() for parameter in self._parameters]
