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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("rank", "parts"), [(32, 1), (128, 1), (128, 4)])
def test_nothing_of_the_kernel_before_is_read_ahead_of_it(rank: int, parts: int) -> None:
    """A load that Triton moves ahead of a loop becomes an asynchronous copy, and would not wait."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rollout_server.vllm_compat import expand_kernel

    pointers = {"sums": "*fp32", "wide": "*bf16", "bias": "*bf16", "token_slots": "*i64", "y": "*bf16"}
    names = ["tokens", "width", "out", "stride_sums", "stride_part", "stride_wide", "second", "third", "fourth"]
    constants = {"SLOTS": 2, "RANK": rank, "PARTS": parts, "BLOCK_T": 16, "BLOCK_N": 32}
    constants |= {"BLOCK_R": min(64, max(16, rank)), "HAS_BIAS": False, "EARLY": True}
    signature = pointers | dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers) + 6)}
    source = ASTSource(expand_kernel._expand, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
    assert "griddepcontrol.wait" in compiled.asm["ptx"]
    assert "async_copy" not in compiled.asm["ttgir"]


def _check(
    tokens: int,
    width: int,
    slices: list[int],
    slots: int,
    rank: int,
    spare: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    from rollout_server.vllm_compat import expand_kernel

    out, columns = sum(slices), len(slices) * slots * rank
    whole = torch.randn(out + columns + spare, width + columns + spare) / width**0.5
    wide, row = whole[: out + columns, : width + columns], 0
    for index, rows in enumerate(slices):  # B is zero in the rows of other slices, and is not read there
        for other in range(len(slices)):
            if other != index:
                wide[row : row + rows, width + other * slots * rank :][:, : slots * rank] = torch.nan
        row += rows
    x, bias = torch.randn(tokens, width + 8)[:, :width], torch.randn(out)
    wide[out:, :width][(slots - 1) * rank : slots * rank] = torch.inf  # the last slot is being written
    for token_slots in (torch.randint(-1, slots - 1, (tokens + 5,)), torch.full((tokens,), -1)):
        for own_bias in (bias, None):
            added = None if own_bias is None else own_bias.to(dtype)
            found = expand_kernel.one_product(x.to(dtype), wide.to(dtype), added, token_slots, slices, slots, rank)
            expected = x @ wide[:out, :width].T + (0 if own_bias is None else own_bias)
            row = 0
            for index, rows in enumerate(slices):
                for slot in range(slots - 1):
                    place = slice((index * slots + slot) * rank, (index * slots + slot + 1) * rank)
                    h = x @ wide[out:, :width][place].T * (token_slots[:tokens, None] == slot)
                    expected[:, row : row + rows] += h @ wide[row : row + rows, width:][:, place].T
                row += rows
            tolerance = 1e-4 if dtype == torch.float32 else 1e-2
            assert torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance), (
                (found - expected).abs().max()
            )


if __name__ == "__main__":
    # The interpreter computes no products in bfloat16, and torch none on CPUs whose sums stay in float32.
    torch.manual_seed(0)
    for tokens, width, slices, slots, rank, spare in (
        (1, 64, [48], 2, 8, 0),
        (16, 96, [64, 32, 32], 2, 16, 8),
        (17, 1000, [128, 128], 3, 8, 0),
        (32, 1024, [96, 48], 2, 48, 0),
        (70, 256, [96], 2, 48, 0),
        (33, 128, [96], 2, 80, 0),
        (5, 128, [96], 2, 160, 0),
    ):
        _check(tokens, width, slices, slots, rank, spare)
        if tokens <= 32:  # the first product by the kernel, too
            _check(tokens, width, slices, slots, rank, spare, torch.float16)
    _check(3, 128, [8192], 2, 16, 0, torch.float16)
