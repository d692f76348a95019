"""Copies between pairs of tensors whose rows lie apart, all of them in one Triton kernel.

torch copies a list of tensors in a few kernels only if all of them are contiguous, and else takes a kernel each: for
the columns of a weight, B of a lower rank than the slot's, or a shard of columns. A push has some hundred of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger("lockstep.slots")

#: Elements that a program copies.
_BLOCK = 4096


class StridedCopies:
    """Pairs of tensors of one shape and element size each, which stay where they are."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Plan the copies of pairs; each tensor is a vector, or a matrix in whose rows elements lie side by side."""
        self._size = pairs[0][0].element_size()
        # Addresses are kept below, tensors here: the memory must not be freed.
        self._kept = pairs
        self._blocks = torch.cat([_blocks(*pair) for pair in pairs]).to(pairs[0][0].device)

    def copy(self, *, back: bool = False) -> None:
        """Copy the first of every pair to its second; `back`: the other way."""
        kernel = _kernel()
        one, other = (1, 0) if back else (0, 1)
        kernel[(len(self._blocks),)](
            self._blocks, self._blocks.shape[1], FROM=one, TO=other, BITS=8 * self._size, BLOCK=_BLOCK
        )


def takes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Return whether one kernel can copy these pairs: on a GPU, where Triton runs."""
    simple = all(one.is_cuda and one.dtype == other.dtype and _is_rows(one) and _is_rows(other) for one, other in pairs)
    return simple and _kernel_runs()


def _is_rows(tensor: torch.Tensor) -> bool:
    return tensor.dim() in (1, 2) and (tensor.shape[-1] == 1 or tensor.stride(-1) == 1)


def _blocks(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a row for each block of a pair, int64: addresses and distances of rows of both, its rows and columns."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)} are not a pair")
    a, b = (tensor.unsqueeze(0) if tensor.dim() == 1 else tensor for tensor in (one, other))
    rows, columns = a.shape
    wide = min(columns, _BLOCK)
    tall = max(1, _BLOCK // wide)
    first_rows, first_columns = torch.arange(0, rows, tall), torch.arange(0, columns, wide)
    row = first_rows.repeat_interleave(len(first_columns))
    column = first_columns.repeat(len(first_rows))
    addresses = [t.data_ptr() + t.element_size() * (row * t.stride(0) + column) for t in (a, b)]
    distances = [torch.full_like(row, t.stride(0)) for t in (a, b)]
    return torch.stack([*addresses, *distances, (rows - row).clamp(max=tall), (columns - column).clamp(max=wide)], 1)


@functools.cache
def _kernel_runs() -> bool:
    """Return whether the kernel copies, here; says why not."""
    try:
        one = torch.randn(37, 2048, device="cuda", dtype=torch.bfloat16)[:, :1030]
        other = torch.zeros(37, 1030, device="cuda", dtype=torch.bfloat16)
        StridedCopies([(one, other)]).copy()
        if torch.equal(one, other):
            return True
        why = "its result is wrong"
    except Exception as error:  # of Triton and its compilers, of any kind
        why = str(error)
    logger.warning("installs take some milliseconds longer: the Triton kernel for copies cannot be used here: %s", why)
    return False


@functools.cache
def _kernel() -> Any:
    """Return the kernel. Triton is there with vLLM for GPUs only."""
    from rollout_server.worker import copy_kernel

    return copy_kernel.copy_blocks
