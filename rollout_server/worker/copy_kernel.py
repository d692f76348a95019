"""The Triton kernel of `strided_copies`."""

from __future__ import annotations

import triton
import triton.language as tl


# Triton takes annotations for names that a kernel uses.
@triton.jit
def copy_blocks(  # type: ignore[no-untyped-def]
    blocks, fields, FROM: tl.constexpr, TO: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy a block a program; a row of `blocks` is what `strided_copies._blocks` returns."""
    block = blocks + tl.program_id(0) * fields
    if BITS == 16:
        kind = tl.pointer_type(tl.int16)
    else:
        kind = tl.pointer_type(tl.int32)
    source = tl.load(block + FROM).to(kind)
    target = tl.load(block + TO).to(kind)
    source_row, target_row = tl.load(block + 2 + FROM), tl.load(block + 2 + TO)
    rows, columns = tl.load(block + 4).to(tl.int32), tl.load(block + 5).to(tl.int32)
    element = tl.arange(0, BLOCK)
    row, column = element // columns, element % columns
    inside = row < rows
    content = tl.load(source + row * source_row + column, mask=inside)
    tl.store(target + row * target_row + column, content, mask=inside)
