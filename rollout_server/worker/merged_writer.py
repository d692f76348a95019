"""Merge W = W0 + B @ A into a worker's live weights, for `--apply merge`: always from a kept W0, so nothing drifts.

An adapter is received and verified while the engine decodes, and applied while the engine is paused. The adapter
applied last is kept as well, so that it can be applied again if another worker fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rollout_server.vllm_compat import linears
from rollout_server.worker.slot_layout import check_fits, lora_pairs
from rollout_server.worker.slot_writer import finite_elements, verify_checksum, views_of
from shared.adapter_file import Layout
from shared.errors import InstallFailed, NotFinite
from shared.rounding import CUT_BITS, Arrived, rounding_seed

#: Left free on a GPU that W0 is kept on, and elements computed at a time (float32: 256 MiB).
_MARGIN_BYTES = 2 * 2**30
_CHUNK = 2**26
#: Rows of a block by which it is judged how much of its update arrived.
_JUDGED_ROWS = 64


class ShardUpdate(NamedTuple):
    """Update of one shard to W0 + b @ a: views of this worker's share of B [rows, rank] and A [rank, columns]."""

    shard: linears.WeightShard
    a: torch.Tensor
    b: torch.Tensor


@dataclass
class _Received:
    """A buffer and its content: an adapter once `checksum` is set. `updates` are views of the buffer."""

    buffer: torch.Tensor
    updates: list[ShardUpdate] = field(default_factory=list)
    checksum: str | None = None


class MergedWriter:
    """Writer of a worker's live weights. `write` and `apply` take one caller each at a time."""

    def __init__(self, worker: Any, keep_base: str = "auto") -> None:
        self._model, self._device = worker.get_model(), worker.device
        self._keep_base = keep_base
        self._targets = linears.merge_targets(worker)
        self._base: dict[str, torch.Tensor] = {}  # layer -> W0, of layers that any adapter has touched
        self._touched: dict[tuple[str, int], linears.WeightShard] = {}  # shards that do not hold W0
        self._spare = self._empty()
        self._applied = self._empty()
        self.arrived = Arrived()  # of the adapter applied last

    def describe(self) -> dict[str, Any]:
        """Count the modules and layers that can be adapted."""
        layers = {shard.layer for target in self._targets.values() for shard in target.shards}
        modules = sum(not target.shape.parts for target in self._targets.values())
        return {"modules": modules, "linear": len(layers)}

    def check(self, layout: Layout) -> None:
        """Raise `LockstepError` unless an adapter of this layout fits (`slot_layout.check_fits`)."""
        check_fits(self._model, {name: target.shape for name, target in self._targets.items()}, layout)

    def buffer(self, layout: Layout) -> torch.Tensor:
        """Return the buffer for the tensors' bytes: uint8 [layout.nbytes] on the device; never the applied one."""
        self._spare.checksum = None
        if self._spare.buffer.nbytes < layout.nbytes:
            self.forget_buffer()
            self._spare.buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        return self._spare.buffer[: layout.nbytes]

    def forget_buffer(self) -> None:
        """Use another buffer from now on: an abandoned transfer may still write into this one."""
        self._spare = self._empty()

    def write(self, slot_id: int, layout: Layout, announced: str) -> int:
        """Verify the buffer, keep W0 of all layers it touches, return the number of modules. Changes no weight.

        Raises:
            LockstepError: `not_finite`, `checksum_mismatch`; `install_failed` if there is no room for W0.
        """
        flat = finite_elements(self.buffer(layout), layout)
        verify_checksum(flat, layout, announced)
        updates = []
        for name, (a, b) in lora_pairs(views_of(flat, layout)).items():
            start = 0
            for shard in self._targets[linears.vllm_module_name(self._model, name)].shards:
                (column, columns), first = shard.columns, start + shard.part.first
                updates.append(ShardUpdate(shard, a[:, column : column + columns], b[first : first + shard.part.rows]))
                start += shard.part.total
        self._keep({update.shard.layer: update.shard.weight for update in updates})
        self._spare.updates, self._spare.checksum = updates, announced
        return len(layout.entries) // 2

    def apply(self, checksum: str | None) -> int:
        """Set the weights to W0 plus the received adapter of that checksum (None: W0 itself). The engine is paused.

        Returns the number of shards that differ from W0 afterwards.

        Raises:
            LockstepError: `not_finite` if a weight overflows: apply another adapter then; `install_failed` if no such
                adapter was received.
        """
        if checksum is not None and checksum != self._applied.checksum:
            if checksum != self._spare.checksum:
                raise InstallFailed(f"no adapter with checksum {checksum} was received")
            self._applied, self._spare = self._spare, self._applied
        updates = self._applied.updates if checksum is not None else []
        stay = {(update.shard.layer, update.shard.row) for update in updates}
        for key in [key for key in self._touched if key not in stay]:
            shard = self._touched[key]
            shard.live.copy_(self._kept(shard))
            del self._touched[key]
        bounds = []
        for update in updates:
            self._touched[update.shard.layer, update.shard.row] = update.shard
            seed = rounding_seed(str(checksum), f"{update.shard.layer} {update.shard.row}")
            bounds += merge(update, self._kept(update.shard), seed)
        if bounds:
            dtype = updates[0].shard.weight.dtype
            if not bool((torch.stack(bounds).abs() <= torch.finfo(dtype).max).all()):  # nor is NaN
                raise NotFinite(f"base plus adapter overflows {dtype}; training diverged")
        sums = [judge(update, self._kept(update.shard)) for update in updates]
        self.arrived = Arrived(*torch.stack(sums).sum(0).tolist()) if sums else Arrived()
        return len(updates)

    def _empty(self) -> _Received:
        return _Received(torch.empty(0, dtype=torch.uint8, device=self._device))

    def _kept(self, shard: linears.WeightShard) -> torch.Tensor:
        return self._base[shard.layer][shard.row : shard.row + shard.part.rows]

    def _keep(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy W0 of layers that no adapter has touched before; so far they hold it."""
        new = {name: weight for name, weight in weights.items() if name not in self._base}
        if not new:
            return
        host = self._keep_base == "host" and self._device.type == "cuda"
        if self._keep_base == "auto" and self._device.type == "cuda":
            needed = sum(weight.nbytes for weight in new.values()) + _MARGIN_BYTES
            host = needed > torch.cuda.mem_get_info(self._device)[0]
        place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if host else {"device": self._device}
        try:
            self._base |= {
                name: torch.empty(weight.shape, dtype=weight.dtype, **place).copy_(weight)
                for name, weight in new.items()
            }
        except (RuntimeError, MemoryError) as error:
            raise InstallFailed(
                f"no room to keep the base weights beside the live ones: {error}; start the server with "
                "--keep-base host, or with a lower --gpu-memory-utilization"
            ) from error


def merge(update: ShardUpdate, base: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Set live = base + b @ a, summed in float32 and rounded once; return the bounds of the exact elements.

    To bfloat16 it is rounded stochastically.

    Args:
        base: W0 [rows, columns] of the shard, on the device or in host memory.
        seed: of the random bits.
    """
    live = update.shard.live
    a, step = update.a.float(), max(1, _CHUNK // live.shape[1])
    generator = torch.Generator(live.device).manual_seed(seed)
    bounds = []
    for start in range(0, live.shape[0], step):
        rows = slice(start, start + step)
        kept = base[rows].to(live.device, non_blocking=True).float()
        exact = torch.addmm(kept, update.b[rows].float(), a)
        bounds += exact.aminmax()
        if live.dtype == torch.bfloat16:
            bits = exact.view(torch.int32)
            bits += torch.randint(2**CUT_BITS, bits.shape, dtype=torch.int32, device=live.device, generator=generator)
            live[rows].view(torch.int16).copy_(bits >> CUT_BITS)
        else:
            live[rows].copy_(exact)
    return bounds


def judge(update: ShardUpdate, base: torch.Tensor) -> torch.Tensor:
    """Return the sums of `Arrived` [3], over some rows of a shard that was merged."""
    live = update.shard.live
    rows = slice(None, None, max(1, live.shape[0] // _JUDGED_ROWS))
    meant = update.b[rows].float() @ update.a.float()
    made = live[rows].float() - base[rows].to(live.device).float()
    return torch.stack([(made * meant).sum(), meant.square().sum(), (made - meant).square().sum()])
