"""Computes W = W0 + B @ A into a worker's live weights, for `--apply merge`: always from a kept W0, so nothing drifts.

Receiving and applying are apart: an adapter is received and verified while the engine decodes, and applied while it is
paused. The adapter applied last is kept as well, so that it can be applied again if another worker fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rollout_server.worker import merged_layout
from rollout_server.worker.slot_writer import Layouts, check_sum, dtype_of, refuse_not_finite, views_of
from shared.adapter_file import Layout
from shared.errors import InstallFailed, NotFinite

KeepBase = Literal["auto", "device", "host"]

#: Left free on a GPU that W0 is kept on, and elements computed at a time (float32: 256 MiB).
_MARGIN_BYTES = 2 * 2**30
_CHUNK = 2**26


@dataclass
class _Received:
    """A buffer, and what lies in it: an adapter once `checksum` is set."""

    buffer: torch.Tensor
    layout: Layout | None = None
    checksum: str | None = None


class MergedWriter:
    """The one writer of a worker's live weights; `write` and `apply` each by one caller at a time."""

    def __init__(self, worker: Any, keep_base: KeepBase = "auto") -> None:
        self._worker = worker
        self._device = worker.device
        self._keep_base = keep_base
        self._known = merged_layout.targets(worker)
        self._layouts = Layouts()
        self._base: dict[str, torch.Tensor] = {}  # layer -> W0, of layers that any adapter has touched
        self._touched: dict[tuple[str, int], merged_layout.Block] = {}  # blocks that do not hold W0
        self._spare = self._empty()
        self._applied = self._empty()

    def describe(self) -> dict[str, Any]:
        """What this worker can adapt, for the log."""
        layers = {block.layer for target in self._known.values() for block in target.blocks}
        return {"modules": len(self._known), "linear": len(layers)}

    def check(self, layout: Layout) -> dict[str, Any]:
        """Would this adapter fit? If so, the layout is remembered."""
        shapes = {entry.name: entry.shape for entry in layout.entries}
        refusal = merged_layout.check(self._worker, self._known, shapes)
        if refusal is None:
            self._layouts.remember(layout)
        return refusal or {"ok": True}

    def layout(self, key: str) -> Layout:
        """A layout that `check` has accepted."""
        return self._layouts[key]

    def buffer(self, layout: Layout) -> torch.Tensor:
        """Where the tensors' bytes belong: uint8 [layout.nbytes] on the worker's device; never what is applied."""
        self._spare.checksum = None
        if self._spare.buffer.nbytes < layout.nbytes:
            self.forget_buffer()
            self._spare.buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        return self._spare.buffer[: layout.nbytes]

    def forget_buffer(self) -> None:
        """Use another buffer from now on: a transfer that was given up may still write into this one."""
        self._spare = self._empty()

    def write(self, slot_id: int, layout: Layout, announced: str) -> int:
        """Verify what lies in the buffer, and keep W0 of all it touches; the number of modules. Changes no weight.

        Raises:
            LockstepError: `not_finite`, `checksum_mismatch`; `install_failed` if there is no room for W0.
        """
        flat = self.buffer(layout).view(dtype_of(layout))
        refuse_not_finite(flat, layout)
        check_sum(flat, layout, announced)
        updates = merged_layout.plan(self._worker, self._known, views_of(flat, layout))
        self._keep({update.block.layer: update.block.weight for update in updates})
        self._spare.layout, self._spare.checksum = layout, announced
        return len(layout.entries) // 2

    def apply(self, checksum: str | None) -> int:
        """Make the weights W0 plus the received adapter of that checksum; None: W0, to the bit. Answers the number of
        modules that differ from W0 now. The engine must be paused.

        Raises:
            LockstepError: `not_finite` if a weight overflows; `install_failed` if no such adapter was received. Apply
                something else then.
        """
        if checksum is not None and checksum != self._applied.checksum:
            if checksum != self._spare.checksum:
                raise InstallFailed(f"no adapter with checksum {checksum} was received")
            self._applied, self._spare = self._spare, self._applied
        wanted = self._applied if checksum is not None else None
        updates: list[merged_layout.Update] = []
        if wanted is not None and wanted.layout is not None:
            flat = wanted.buffer[: wanted.layout.nbytes].view(dtype_of(wanted.layout))
            updates = merged_layout.plan(self._worker, self._known, views_of(flat, wanted.layout))
        stay = {(update.block.layer, update.block.at) for update in updates}
        for key in [key for key in self._touched if key not in stay]:
            block = self._touched[key]
            block.live.copy_(self._kept(block))
            del self._touched[key]
        bounds = []
        for update in updates:
            self._touched[update.block.layer, update.block.at] = update.block
            bounds += merge(update, self._kept(update.block))
        if bounds and not bool(torch.stack(bounds).isfinite().all()):
            raise NotFinite(f"base plus adapter overflows {updates[0].block.weight.dtype}; training diverged")
        return len(wanted.layout.entries) // 2 if wanted is not None and wanted.layout is not None else 0

    def _empty(self) -> _Received:
        return _Received(torch.empty(0, dtype=torch.uint8, device=self._device))

    def _kept(self, block: merged_layout.Block) -> torch.Tensor:
        return self._base[block.layer][block.at : block.at + block.rows]

    def _keep(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy W0 of layers that no adapter has touched before; so far they hold it."""
        new = {name: weight for name, weight in weights.items() if name not in self._base}
        if not new:
            return
        host = self._device.type == "cuda" and not self._fits(sum(weight.nbytes for weight in new.values()))
        try:
            copies = {}
            for name, weight in new.items():
                place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if host else {"device": self._device}
                copies[name] = torch.empty(weight.shape, dtype=weight.dtype, **place).copy_(weight)
        except (RuntimeError, MemoryError) as error:
            raise InstallFailed(
                f"no room to keep the base weights beside the live ones: {error}; start the server with "
                "--keep-base host, or with a lower --gpu-memory-utilization"
            ) from error
        self._base |= copies

    def _fits(self, nbytes: int) -> bool:
        if self._keep_base == "auto":
            return nbytes + _MARGIN_BYTES <= torch.cuda.mem_get_info(self._device)[0]
        return self._keep_base == "device"


def merge(update: merged_layout.Update, base: torch.Tensor) -> list[torch.Tensor]:
    """live = base + b @ a, summed in float32 and rounded once; smallest and largest element of what was written.

    Args:
        base: W0 [rows, columns] of the block, on the device or in host memory.
    """
    live = update.block.live
    a, step = update.a.float(), max(1, _CHUNK // live.shape[1])
    bounds = []
    for start in range(0, live.shape[0], step):
        rows = slice(start, start + step)
        kept = base[rows].to(live.device, non_blocking=True).float()
        live[rows].copy_(torch.addmm(kept, update.b[rows].float(), a))
        bounds += live[rows].aminmax()
    return bounds
