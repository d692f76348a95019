"""Rows of `bench.learner`: on how many ranks, beside which row on one rank, and how far their updates are from its."""

from __future__ import annotations

from collections.abc import Mapping

import torch

#: On one rank; from "packed" on, each has what the one before it has.
PLAIN, CUT, PACKED, PRODUCT, COMPILED = "TRL", "padding cut", "packed", "one product", "compiled"
#: On several ranks. Where weights are sharded there is neither the one product nor compiled layers.
DDP, FSDP2, ZERO3 = "DDP", "FSDP2", "ZeRO-3"
ALONE, TOGETHER, SHARDED = (PLAIN, CUT, PACKED, PRODUCT, COMPILED), (DDP, FSDP2, ZERO3), (FSDP2, ZERO3)
#: Row -> the row on one rank whose passes are the most like its own, in the order of preference. Two rows on one rank
#: differ by what bfloat16 rounds away.
BESIDE: Mapping[str, tuple[str, ...]] = {
    PLAIN: (PACKED,),
    CUT: (PACKED,),
    PRODUCT: (PACKED,),
    COMPILED: (PRODUCT, PACKED),
    DDP: (COMPILED, PRODUCT, PACKED),
    FSDP2: (PACKED,),
    ZERO3: (PACKED,),
}


def difference(updates: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return how far updates are from others: |u - v| / |v|, and the regression of u on v, which is 1 where they agree.

    Raises:
        ValueError: they are updates of different matrices, or nothing was updated.
    """
    if updates.keys() != expected.keys():
        raise ValueError("the updates are of different matrices")
    pairs = [(updates[name].double(), other.double()) for name, other in expected.items()]
    size = sum(float(v.square().sum()) for _, v in pairs)
    if not size:
        raise ValueError("nothing was updated")
    apart = sum(float((u - v).square().sum()) for u, v in pairs)
    along = sum(float((u * v).sum()) for u, v in pairs)
    return {"difference": (apart / size) ** 0.5, "slope": along / size}
