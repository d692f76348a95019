"""The Triton kernel of `--apply columns`, in Triton's interpreter; skipped where Triton is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_computes_what_torch_does() -> None:
    # Triton reads the variable when it is imported.
    child = subprocess.run(
        [sys.executable, "-m", __name__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


def _check(tokens: int, width: int, slots: int, rank: int, dtype: torch.dtype) -> None:
    from rollout_server.vllm_compat import shrink_kernel

    x = torch.randn(tokens, width + 8).to(dtype)[:, :width]
    a = (torch.randn(slots * rank, width) / width**0.5).to(dtype)
    column_slots = torch.arange(slots).repeat_interleave(rank)
    for token_slots in (torch.randint(-1, slots, (tokens + 5,)), torch.full((tokens,), -1)):
        own = token_slots[:tokens, None] == column_slots
        found = shrink_kernel.extend(x, a, token_slots, column_slots)
        assert torch.equal(found[:, :width], x)
        assert torch.allclose(found[:, width:], torch.where(own, x @ a.T, 0), rtol=2e-3, atol=1e-4)
        assert torch.equal(found[:, width:] != 0, own)
        assert not shrink_kernel._counters[x.device].any()


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32):  # the interpreter computes no products in bfloat16
        _check(1, 64, 2, 8, dtype)
        _check(16, 96, 2, 16, dtype)
        _check(17, 1000, 3, 8, dtype)
        _check(70, 1536, 2, 48, dtype)
