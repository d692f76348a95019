from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.adapter_file import Layout, TensorEntry, lay_out
from shared.checksum import _CHUNK, BLOCK, block_sums, block_weights, checksum

ENTRIES = lay_out({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)}, "float32")


def _sums(elements: np.ndarray) -> np.ndarray:
    return np.concatenate(list(block_sums(elements, block_weights())))


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, _CHUNK + 3 * BLOCK + 7])
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_torch_numpy_and_plain_integers_agree(n: int, dtype: type) -> None:
    info = np.iinfo(dtype)
    elements = np.random.default_rng(n).integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    sums = _sums(elements)
    on_torch = torch.cat(list(block_sums(torch.from_numpy(elements), torch.from_numpy(block_weights()))))
    assert np.array_equal(sums, on_torch.numpy())
    assert len(sums) == -(-n // BLOCK)
    last = elements[len(sums) * BLOCK - BLOCK :].tolist()
    expected = sum(x * w for x, w in zip(last, block_weights().tolist(), strict=False)) % 2**64
    assert int(sums[-1]) % 2**64 == expected


def test_weights_are_odd_and_different() -> None:
    weights = block_weights()
    assert (weights & 1).all()
    assert len(set(weights.tolist())) == BLOCK


def test_every_single_bit_and_every_swap_of_neighbours_is_noticed() -> None:
    elements = np.random.default_rng(0).integers(-(2**31), 2**31, 14, dtype=np.int32)
    known = {_sums(elements).tobytes()}
    for i in range(14):
        for bit in range(32):
            changed = elements.copy()
            changed[i] ^= np.int32(1 << bit) if bit < 31 else np.int32(-(2**31))
            known.add(_sums(changed).tobytes())
    assert len(known) == 1 + 14 * 32
    for i in range(13):
        swapped = elements.copy()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        assert _sums(swapped).tobytes() not in known


def test_covers_names_shapes_and_bytes() -> None:
    renamed = [TensorEntry(e.name.replace("m.", "n."), e.dtype, e.shape, e.start, e.end) for e in ENTRIES]
    reshaped = [TensorEntry(e.name, e.dtype, e.shape[::-1], e.start, e.end) for e in ENTRIES]
    digests = {checksum(Layout(entries).index, b"12345678") for entries in (ENTRIES, renamed, reshaped)}
    assert len(digests | {checksum(Layout(ENTRIES).index, b"12345679")}) == 4
