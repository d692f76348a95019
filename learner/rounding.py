"""How much of each optimizer step is lost where the adapter is coarser than what the optimizer keeps of it.

Under DeepSpeed ZeRO-3 TRL leaves the adapter in the base's dtype, bfloat16 as a rule. The optimizer adds its updates to
a float32 copy, and what is computed with, pushed and saved is that copy, rounded. Small updates do not show at once:
they add up in the copy until they move the adapter by a whole unit in its last place.
"""

from __future__ import annotations

import torch
from peft import PeftModel


class RoundedUpdates:
    """Compares the steps that the adapter makes with those of the optimizer's float32 copy of it.

    Args:
        model: of which the optimizer has been made.
    """

    def __init__(self, model: PeftModel) -> None:
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
        moved, missed = 0.0, 0.0
        for parameter, old, new in zip(self._parameters, before, self._before, strict=True):
            meant = new - old
            made = new.to(parameter.dtype).float() - old.to(parameter.dtype).float()
            moved += float(meant.square().sum())
            missed += float((made - meant).square().sum())
        return (missed / moved) ** 0.5 if moved else None

    def _copies(self) -> list[torch.Tensor]:
        """float32 copies of all parameters, whole."""
        if not self._parameters:
            return []
        from deepspeed.utils import safe_get_full_fp32_param

        return [safe_get_full_fp32_param(parameter).clone() for parameter in self._parameters]
