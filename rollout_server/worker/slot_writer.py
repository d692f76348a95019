"""Writes a received adapter into a slot, in a worker process, and proves what lies there.

Whatever the transport, an adapter arrives as one flat buffer on the worker's device. A layout (names, shapes, dtype)
stays the same over a whole run, so the views of buffer and slot are made once, and an install is a few kernels:
buffer -> slot, clear the buffer, slot -> buffer, checksum of what came back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from rollout_server.vllm_compat import versions
from rollout_server.worker import slot_layout
from shared.adapter_file import Layout
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import ChecksumMismatch, NotFinite

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INTEGERS = {2: torch.int16, 4: torch.int32}
_LAYOUTS_KEPT = 64


class Layouts(dict[str, Layout]):
    """The layouts used last, by key."""

    def remember(self, layout: Layout) -> None:
        """Keep `layout`, and forget the oldest."""
        self.pop(layout.key, None)
        self[layout.key] = layout
        while len(self) > _LAYOUTS_KEPT:
            self.pop(next(iter(self)))


class SlotWriter:
    """The one writer of a worker's adapter slots; callers take care that only one of them uses it at a time."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._device = worker.device
        self._layouts = Layouts()
        self._held: dict[int, str] = {}  # slot index -> key of the layout that was last written there
        self._plans: dict[tuple[int, str], slot_layout.Plan] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)

    def describe(self) -> dict[str, Any]:
        """What this worker can adapt, for the log."""
        return slot_layout.describe(self._worker)

    def check(self, layout: Layout) -> dict[str, Any]:
        """Would this adapter fit? If so, the layout is remembered."""
        shapes = {entry.name: entry.shape for entry in layout.entries}
        refusal = slot_layout.check(self._worker, shapes)
        if refusal is None:
            self._layouts.remember(layout)
        return refusal or {"ok": True}

    def layout(self, key: str) -> Layout:
        """A layout that `check` has accepted."""
        return self._layouts[key]

    def buffer(self, layout: Layout) -> torch.Tensor:
        """Where the tensors' bytes belong: uint8 [layout.nbytes] on the worker's device."""
        if self._buffer.nbytes < layout.nbytes:
            self.forget_buffer()
            self._buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        return self._buffer[: layout.nbytes]

    def forget_buffer(self) -> None:
        """Use another buffer from now on: a transfer that was given up may still write into this one."""
        self._plans.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)

    def write(self, slot_id: int, layout: Layout, announced: str) -> int:
        """Write what lies in the buffer into a slot; the number of modules written.

        Raises:
            LockstepError: `not_finite`, before the slot is touched; `checksum_mismatch` if the slot does not hold
                what was announced.
        """
        flat = self.buffer(layout).view(dtype_of(layout))
        refuse_not_finite(flat, layout)
        index = versions.slot_index(self._worker, slot_id)
        if self._held.get(index) != layout.key:
            slot_layout.clear(self._worker, index)
            self._held[index] = layout.key
        plan = self._plans.get((index, layout.key))
        if plan is None:
            plan = self._plans[index, layout.key] = slot_layout.plan(self._worker, index, views_of(flat, layout))
        for copies in plan.copies:
            torch._foreach_copy_(copies.slot, copies.received)
            torch._foreach_zero_(copies.received)
            torch._foreach_copy_(copies.received, copies.slot)
        check_sum(flat, layout, announced)
        return plan.modules


def dtype_of(layout: Layout) -> torch.dtype:
    """The one dtype of all tensors."""
    return _DTYPES[layout.entries[0].dtype]


def views_of(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by name, as views of the buffer that holds them."""
    parts = flat.split([(entry.end - entry.start) // flat.element_size() for entry in layout.entries])
    return {entry.name: part.view(entry.shape) for entry, part in zip(layout.entries, parts, strict=True)}


def refuse_not_finite(flat: torch.Tensor, layout: Layout) -> None:
    """Raise `not_finite` if any tensor holds NaN or infinity."""
    low, high = flat.aminmax()
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    bad = [name for name, tensor in views_of(flat, layout).items() if not bool(torch.isfinite(tensor).all())]
    raise NotFinite(
        f"{len(bad)} tensors hold NaN or infinity, the first is {min(bad)}; the optimizer step that made them diverged"
    )


def check_sum(flat: torch.Tensor, layout: Layout, announced: str) -> None:
    """Raise `checksum_mismatch` unless the adapter that lies in `flat` has the announced checksum."""
    sums = torch.cat(list(block_sums(flat.view(_INTEGERS[flat.element_size()]), _weights(flat.device))))
    found = checksum(layout.index, sums.cpu().numpy().tobytes())
    if found != announced:
        raise ChecksumMismatch(f"the tensors arrived with checksum {found}, announced was {announced}; push again")


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(block_weights()).to(device)
