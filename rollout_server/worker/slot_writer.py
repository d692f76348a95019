"""Write a received adapter into a slot, in a worker process, and verify the slot's content.

Whatever the transport, an adapter arrives as one flat buffer on the worker's device. A layout (names, shapes, dtype)
stays the same over a run, so the views of buffer and slot are made once, and an install is a few kernels: buffer ->
slot, clear the buffer, slot -> buffer, checksum of the read-back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from rollout_server.vllm_compat import lora_slots
from rollout_server.worker import slot_layout
from shared.adapter_file import Layout
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import ChecksumMismatch, NotFinite

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INTEGERS = {2: torch.int16, 4: torch.int32}


class SlotWriter:
    """Writer of a worker's adapter slots. Callers use it one at a time."""

    _buffer: torch.Tensor

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._written: dict[int, str] = {}  # slot index -> key of the layout that was last written there
        self._plans: dict[tuple[int, str], slot_layout.CopyPlan] = {}
        self.forget_buffer()

    def describe(self) -> dict[str, Any]:
        """Describe the layers that can be adapted, and the memory of a slot."""
        layers = lora_slots.lora_layers(self._worker)
        return {
            "modules": sum(len(layer.modules) for layer in layers),
            "linear": len(layers),
            "in_columns": sum(layer.in_columns for layer in layers),
            "slot_bytes": lora_slots.slot_bytes(self._worker),
        }

    def check(self, layout: Layout) -> None:
        """Raise `LockstepError` unless an adapter of this layout fits (`slot_layout.check_fits`)."""
        layers = lora_slots.lora_layers(self._worker)
        served = {name: shape for layer in layers for name, shape in layer.shapes().items()}
        slot_layout.check_fits(self._worker.get_model(), served, layout)

    def buffer(self, layout: Layout) -> torch.Tensor:
        """Return the buffer for the tensors' bytes: uint8 [layout.nbytes] on the worker's device."""
        if self._buffer.nbytes < layout.nbytes:
            self.forget_buffer()
            self._buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._worker.device)
        return self._buffer[: layout.nbytes]

    def forget_buffer(self) -> None:
        """Use another buffer from now on: an abandoned transfer may still write into this one."""
        self._plans.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._worker.device)

    def write(self, slot_id: int, layout: Layout, announced: str) -> int:
        """Write the buffer into a slot and return the number of modules written.

        Raises:
            LockstepError: `not_finite`, before the slot is touched; `checksum_mismatch` if the slot's content differs
                from the announced checksum.
        """
        flat = finite_elements(self.buffer(layout), layout)
        index = lora_slots.slot_index(self._worker, slot_id)
        if self._written.get(index) != layout.key:
            # Modules that this layout leaves out must not keep values of another one.
            for layer in lora_slots.lora_layers(self._worker):
                layer.clear(index)
            self._written[index] = layout.key
        plan = self._plans.get((index, layout.key))
        if plan is None:
            tensors = views_of(flat, layout)
            plan = self._plans[index, layout.key] = slot_layout.plan_copies(self._worker, index, tensors)
        for received, slot in plan.repeated:
            slot.copy_(received)
        for copies in plan.groups:
            copies.write()
            copies.read_back()
        verify_checksum(flat, layout, announced)
        differ = [(slot != received).any() for received, slot in plan.repeated]
        if differ and bool(torch.stack(differ).any()):
            raise ChecksumMismatch("a tensor that lies in several slices of a layer is not the same in all; push again")
        return len(layout.entries) // 2


def views_of(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by name, as views of the buffer that holds them."""
    parts = flat.split([(entry.end - entry.start) // flat.element_size() for entry in layout.entries])
    return {entry.name: part.view(entry.shape) for entry, part in zip(layout.entries, parts, strict=True)}


def finite_elements(buffer: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the elements of all tensors in `buffer`; raises `not_finite` if any tensor holds NaN or infinity."""
    flat = buffer.view(_DTYPES[layout.entries[0].dtype])
    low, high = flat.aminmax()
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return flat
    bad = [name for name, tensor in views_of(flat, layout).items() if not bool(torch.isfinite(tensor).all())]
    raise NotFinite(
        f"{len(bad)} tensors hold NaN or infinity, the first is {min(bad)}; the optimizer step that made them diverged"
    )


def verify_checksum(flat: torch.Tensor, layout: Layout, announced: str) -> None:
    """Raise `checksum_mismatch` unless the adapter in `flat` has the announced checksum."""
    sums = torch.cat(list(block_sums(flat.view(_INTEGERS[flat.element_size()]), _weights(flat.device))))
    found = checksum(layout.index, sums.cpu().numpy().tobytes())
    if found != announced:
        raise ChecksumMismatch(f"the tensors arrived with checksum {found}, announced was {announced}; push again")


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(block_weights()).to(device)
