"""`shrink.extend` as one Triton kernel, for decoding: few tokens, and a launch for each layer of each token.

A program computes a block of tokens and columns over a part of `in`, so that there are programs enough for all of a
GPU; of those with the same block the one that ends last adds the parts up, in their order: equal inputs give equal
bits. Programs of one more column of blocks copy x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Elements of `in` to a program, and to a step of it.
_PART, _STEP = 512, 128
#: Above, launches matter less than what torch's own products save.
_MAX_TOKENS = 512
#: Blocks of tokens and columns that can be counted.
_MAX_BLOCKS = 2**14

_counters: dict[torch.device, torch.Tensor] = {}


def takes(x: torch.Tensor, a: torch.Tensor) -> bool:
    """Return whether `extend` is for inputs of this size."""
    return x.shape[0] <= _MAX_TOKENS and x.stride(1) == 1 and a.shape[0] <= _MAX_BLOCKS


def extend(x: torch.Tensor, a: torch.Tensor, token_slots: torch.Tensor, column_slots: torch.Tensor) -> torch.Tensor:
    """Return what `shrink.extend` returns. Calls on one device share a stream."""
    (tokens, width), columns = x.shape, a.shape[0]
    extended = x.new_empty(tokens, width + columns)
    block_t, block_c = 16 if tokens <= 16 else 32, 32 if columns >= 64 else 16
    parts, rows, blocks = triton.cdiv(width, _PART), triton.cdiv(tokens, block_t), triton.cdiv(columns, block_c)
    if x.device not in _counters:
        _counters[x.device] = torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=x.device)
    sums = torch.empty(rows * blocks * parts * block_t * block_c, dtype=torch.float32, device=x.device)
    _extend[rows, blocks + 1, parts](
        x,
        a,
        token_slots,
        column_slots,
        extended,
        sums,
        _counters[x.device],
        tokens,
        width,
        columns,
        x.stride(0),
        PARTS=parts,
        PART=_PART,
        STEP=_STEP,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
    )
    return extended


@triton.jit
def _extend(
    x: Any,
    a: Any,
    token_slots: Any,
    column_slots: Any,
    extended: Any,
    sums: Any,
    ended: Any,
    tokens: Any,
    width: Any,
    columns: Any,
    stride: Any,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    blocks = tl.num_programs(1) - 1
    block, part = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # 64 bits: a batch of a long prompt has more elements than 32 bits count.
    x_rows = x + rows[:, None].to(tl.int64) * stride
    extended_rows = extended + rows[:, None].to(tl.int64) * (width + columns)
    if block == blocks:
        for start in range(part * PART, part * PART + PART, STEP):
            inner = start + tl.arange(0, STEP)
            inside = (rows[:, None] < tokens) & (inner[None, :] < width)
            tl.store(extended_rows + inner[None, :], tl.load(x_rows + inner[None, :], mask=inside), mask=inside)
        return
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    of_tokens = tl.load(token_slots + rows, mask=rows < tokens, other=-1)
    of_columns = tl.load(column_slots + cols, mask=cols < columns, other=-2)
    own = of_tokens[:, None] == of_columns[None, :]
    place = extended_rows + width + cols[None, :]
    written = (rows[:, None] < tokens) & (cols[None, :] < columns)
    if tl.max(tl.max(own.to(tl.int32), 1), 0) == 0:
        if part == 0:
            tl.store(place, tl.zeros((BLOCK_T, BLOCK_C), dtype=x.dtype.element_ty), mask=written)
        return
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(part * PART, part * PART + PART, STEP):
        inner = start + tl.arange(0, STEP)
        of_x = tl.load(x_rows + inner[None, :], mask=(rows[:, None] < tokens) & (inner[None, :] < width), other=0.0)
        a_at = a + cols[None, :].to(tl.int64) * width + inner[:, None]
        of_a = tl.load(a_at, mask=(cols[None, :] < columns) & (inner[:, None] < width), other=0.0)
        total = tl.dot(of_x, of_a, total, input_precision="ieee")
    index = tl.program_id(0) * blocks + block
    element = tl.arange(0, BLOCK_T)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(sums + (index * PARTS + part) * BLOCK_T * BLOCK_C + element, total)
    tl.debug_barrier()  # all threads of this program have stored their elements
    if tl.atomic_add(ended + index, 1, sem="acq_rel") == PARTS - 1:
        tl.store(ended + index, 0)
        h = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for each in range(PARTS):
            h += tl.load(sums + (index * PARTS + each) * BLOCK_T * BLOCK_C + element)
        tl.store(place, tl.where(own, h, 0.0).to(x.dtype.element_ty), mask=written)
