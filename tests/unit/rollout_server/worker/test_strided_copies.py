"""Copies of tensors whose rows lie apart; the kernel in Triton's interpreter, skipped where Triton is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rollout_server.worker import strided_copies


def _pairs(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of several shapes, the second of each a part of something larger."""
    shapes = [(3, 5000), (700, 8), (4, 4096), (1, 1), (65, 1), (1025, 33)]
    pairs = [(torch.randn(shape).to(dtype), torch.zeros(shape[0], shape[1] + 24, dtype=dtype)) for shape in shapes]
    return [(one, other[:, 8 : 8 + one.shape[1]]) for one, other in pairs] + [
        (torch.randn(9000).to(dtype), torch.zeros(9000, dtype=dtype))
    ]


def test_every_element_is_in_one_block() -> None:
    for one, other in _pairs(torch.float32):
        counts = torch.zeros(one.numel() + 100, dtype=torch.int64)
        for address, _, distance, _, rows, columns in strided_copies._blocks(one, other).tolist():
            first = (address - one.data_ptr()) // one.element_size()
            for row in range(rows):
                counts[first + row * distance : first + row * distance + columns] += 1
        assert counts[: one.numel()].tolist() == [1] * one.numel()


def test_pairs_are_of_one_shape() -> None:
    with pytest.raises(ValueError, match="not a pair"):
        strided_copies._blocks(torch.zeros(2, 3), torch.zeros(3, 2))


def test_on_a_cpu_torch_copies() -> None:
    assert not strided_copies.takes(_pairs(torch.float32))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_they_are_copied_both_ways() -> None:
    # Triton reads the variable when it is imported.
    child = subprocess.run(
        [sys.executable, "-m", __name__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


if __name__ == "__main__":
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        pairs = _pairs(dtype)
        copies = strided_copies.StridedCopies(pairs)
        copies.copy()
        assert all(torch.equal(one, other) for one, other in pairs)
        assert all(not other._base[:, :8].any() for _, other in pairs[:-1])  # nothing beside them was written
        sent = [one.clone() for one, _ in pairs]
        for one, _ in pairs:
            one.zero_()
        copies.copy(back=True)
        assert all(torch.equal(one, first) for (one, _), first in zip(pairs, sent, strict=True))
