"""Checksum of an adapter: cheap on a GPU, the same on every device, and independent of a tensor library.

Elements are read as integers of their width, in file order. Each block of `BLOCK` elements x_0, x_1, ... is hashed to
sum(w_i * x_i) modulo 2**64 with fixed odd pseudo-random weights w_i (multilinear hashing: Lemire and Kaser, "Strongly
universal string hashing is fast", 2014), which needs one product and one sum of a tensor library. The list of block
sums and the tensor index are then hashed with xxh3-128. It detects accidents, not forgeries: only the holder of the
lease can push.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash

BLOCK = 4096
_CHUNK = 1024 * BLOCK  # elements at a time: bounds the memory for the 64-bit products


def block_weights() -> np.ndarray:
    """Return the weights w, int64 [BLOCK]: splitmix64 of 1, 2, ..., made odd."""
    with np.errstate(over="ignore"):
        z = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31)) | np.uint64(1)).view(np.int64)


def block_sums(elements: Any, weights: Any) -> Iterator[Any]:
    """Yield the sums of all blocks in order, in a few arrays int64 [blocks].

    Args:
        elements: int16 or int32 [n], a NumPy array or a torch tensor on any device.
        weights: `block_weights()` in the same library, on the same device.
    """
    complete = len(elements) // BLOCK * BLOCK
    for start in range(0, complete, _CHUNK):
        part = elements[start : min(start + _CHUNK, complete)]
        yield (part.reshape(-1, BLOCK) * weights).sum(-1)
    if complete < len(elements):
        yield (elements[complete:].reshape(1, -1) * weights[: len(elements) - complete]).sum(-1)


def checksum(index: bytes, sums: bytes) -> str:
    """Return 32 hex digits for tensors of `adapter_file.Layout.index` and their block sums, little-endian int64."""
    digest = xxhash.xxh3_128(index)
    digest.update(sums)
    return digest.hexdigest()
