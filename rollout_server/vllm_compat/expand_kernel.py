"""One product for few tokens, by Triton kernels: for decoding, where a step reads every weight once.

[z, h] = x [W, A]ᵀ is one product whose output stays in float32: A lies below W in memory, and a few more rows cost
next to nothing where reading W takes all the time. A second kernel adds h Bᵀ to z and rounds once. It reads B only of
the slots that a block of tokens uses, and of the slice that a block of outputs is of.

Up to 32 tokens the first product is a kernel of ours too, in parts along `in` that the second kernel adds up in their
order: equal inputs give equal bits. Where the GPU can (programmatic dependent launch, Hopper and later), a kernel is
launched before the one in front of it has ended, and waits for its results only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

#: Above, writing and reading z in float32 takes longer than a product of [x, h].
_MAX_TOKENS = 512
#: Up to here, the first product is a kernel of ours.
_OWN_PRODUCT_TOKENS = 32
#: A layer has at most so many slices.
_SLICES = 4
_NO_ROW = 2**30
#: Rows of a weight from which on larger blocks are faster (measured on an H100).
_LARGE = 8192


def takes(x: torch.Tensor, slices: Sequence[int]) -> bool:
    """Return whether `one_product` is for inputs of this size and such a layer."""
    return x.shape[0] <= _MAX_TOKENS and len(slices) <= _SLICES and not any(rows % 16 for rows in slices)


def one_product(
    x: torch.Tensor,
    wide: torch.Tensor,
    bias: torch.Tensor | None,
    token_slots: torch.Tensor,
    slices: Sequence[int],
    slots: int,
    rank: int,
    *,
    own_product: bool = True,
) -> torch.Tensor:
    """Return what `one_product.one_product` returns for tokens of several slots.

    Args:
        x: [tokens, in].
        wide: [out + columns, in + columns], W, right of it B, below it A.
        bias: [out].
        token_slots: [tokens or more], int64; -1 for the base.
        slices: rows of W of each slice.
        own_product: use the kernel for the first product too; it needs some 120 KiB of shared memory.
    """
    (tokens, width), out = x.shape, sum(slices)
    early: dict[str, bool] = {}
    if own_product and tokens <= _OWN_PRODUCT_TOKENS and x.element_size() == 2:
        early = {"launch_pdl": True} if _launches_early(x.device) else {}
        sums = _parts(x, wide, early)
    elif x.dtype == torch.float32:
        sums = torch.mm(x, wide[:, :width].t())[None]
    else:
        sums = torch.mm(x, wide[:, :width].t(), out_dtype=torch.float32)[None]
    y = x.new_empty(tokens, out)
    starts = [sum(slices[:i]) for i in range(1, len(slices))]
    block_n = next(size for size in (32 if early else 64, 32, 16) if not any(start % size for start in starts))
    block_t = 16 if tokens <= 16 else 32
    _expand[triton.cdiv(out, block_n), triton.cdiv(tokens, block_t)](
        sums,
        wide,
        y if bias is None else bias,
        token_slots,
        y,
        tokens,
        width,
        out,
        sums.stride(1),
        sums.stride(0),
        wide.stride(0),
        *starts,
        *[_NO_ROW] * (_SLICES - 1 - len(starts)),
        SLOTS=slots,
        RANK=rank,
        PARTS=len(sums),
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))),
        HAS_BIAS=bias is not None,
        EARLY=bool(early),
        **early,
    )
    return y


def _launches_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _parts(x: torch.Tensor, wide: torch.Tensor, early: dict[str, bool]) -> torch.Tensor:
    """Return parts of x [W, A]ᵀ [parts, tokens, out + columns] in float32, which add up to it."""
    (tokens, width), rows = x.shape, wide.shape[0]
    if rows >= _LARGE:
        block_n, stages, parts = 128, 3, 1
    elif tokens <= 16:
        block_n, stages, parts = 64, 4, 4
    else:
        block_n, stages, parts = 32, 6, 1 if rows > 32 * 128 else 2
    block_k = 128
    part = triton.cdiv(triton.cdiv(width, parts), block_k) * block_k
    parts = triton.cdiv(width, part)
    sums = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
    _product[triton.cdiv(rows, block_n), parts](
        x,
        wide,
        sums,
        tokens,
        width,
        rows,
        x.stride(0),
        wide.stride(0),
        BLOCK_T=16 if tokens <= 16 else 32,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PART=part,
        STAGES=stages,
        EVEN=width % part == 0,
        EARLY=bool(early),
        num_warps=4,
        **early,
    )
    return sums


# Triton takes annotations for names that a kernel uses.
@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x,
    wide,
    sums,
    tokens,
    width,
    rows,
    stride_x,
    stride_wide,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    token, row = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * PART
    inner = start + tl.arange(0, BLOCK_K)
    # Not masked: tokens and rows that there are not are others once more, and are not stored.
    # 64 bits: a large weight has more elements than 32 bits count.
    x_at = x + (token % tokens)[:, None] * stride_x + inner[None, :]
    w_at = wide + (row % rows)[None, :].to(tl.int64) * stride_wide + inner[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for k in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        if EVEN:
            of_x, of_w = tl.load(x_at + k), tl.load(w_at + k)
        else:
            inside = inner + k < width
            of_x = tl.load(x_at + k, mask=inside[None, :], other=0.0)
            of_w = tl.load(w_at + k, mask=inside[:, None], other=0.0)
        total = tl.dot(of_x, of_w, total)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    place = sums + (tl.program_id(1) * tokens + token[:, None]) * rows + row[None, :]
    tl.store(place, total, mask=(token[:, None] < tokens) & (row[None, :] < rows))


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    sums,
    wide,
    bias,
    token_slots,
    y,
    tokens,
    width,
    out,
    stride_sums,
    stride_part,
    stride_wide,
    second,
    third,
    fourth,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    index = (start >= second).to(tl.int32) + (start >= third).to(tl.int32) + (start >= fourth).to(tl.int32)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = start + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < tokens) & (cols[None, :] < out)
    of_tokens = tl.load(token_slots + rows, mask=rows < tokens, other=-1)
    sums_rows = sums + rows[:, None] * stride_sums
    b_rows = wide + cols[None, :].to(tl.int64) * stride_wide + width
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for slot in range(SLOTS):
        own = of_tokens == slot
        if tl.max(own.to(tl.int32), 0) > 0:
            first = (index * SLOTS + slot) * RANK
            # In one stage: loads that are begun ahead of the loop would not wait for the kernel before.
            for at in tl.range(0, RANK, BLOCK_R, num_stages=1):
                rank = at + tl.arange(0, BLOCK_R)
                b_inside = (rank[:, None] < RANK) & (cols[None, :] < out)
                b = tl.load(b_rows + first + rank[:, None], mask=b_inside, other=0.0)
                if EARLY:  # B does not come from the kernel before
                    tl.extra.cuda.gdc_wait()
                # What is being written into a slot that no token uses may overflow: it is not read.
                h_inside = own[:, None] & (rank[None, :] < RANK)
                h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
                for part in range(PARTS):
                    h_at = sums_rows + part * stride_part + out + first + rank[None, :]
                    h += tl.load(h_at, mask=h_inside, other=0.0)
                total = tl.dot(h.to(wide.dtype.element_ty), b, total, input_precision="ieee")
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for part in range(PARTS):
        total += tl.load(sums_rows + part * stride_part + cols[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < out, other=0.0)[None, :].to(tl.float32)
    tl.store(y + rows[:, None].to(tl.int64) * out + cols[None, :], total.to(y.dtype.element_ty), mask=inside)
