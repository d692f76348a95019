"""Safetensors files without a tensor library: read in place, widened to float32, rounded once, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapter_file import DTYPES, TensorEntry
from shared.errors import MalformedAdapter, UnsupportedAdapter

#: What can be widened to float32 without loss.
WIDENED = ("F32", "BF16", "F16")


class TensorFile:
    """One safetensors file, mapped into memory: nothing is read before it is asked for.

    Attributes:
        entries: where each tensor lies, by name, in the order of the header.

    Raises:
        LockstepError: `malformed_adapter` if it is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                document: dict[str, Any] = json.loads(stream.read(min(length, path.stat().st_size)))
            document.pop("__metadata__", None)
            self.entries = {
                name: TensorEntry(name, info["dtype"], tuple(info["shape"]), *info["data_offsets"])
                for name, info in document.items()
            }
            self._data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{path} is no readable safetensors file ({error})"
            raise MalformedAdapter(message) from error
        if any(entry.end > len(self._data) for entry in self.entries.values()):
            raise MalformedAdapter(f"{path} has been cut off: some tensors are missing")

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8 [n]."""
        entry = self.entries[name]
        return self._data[entry.start : entry.end]

    def float32(self, name: str) -> np.ndarray:
        """A tensor of `WIDENED` as float32, in its shape.

        Raises:
            LockstepError: `unsupported_adapter` for any other dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in WIDENED:
            raise UnsupportedAdapter(
                f"{name} in {self.path} is {entry.dtype}: only float32, bfloat16 and float16 can be computed with"
            )
        return widened(self.raw(name), entry.dtype).reshape(entry.shape)


def widened(raw: np.ndarray, code: str) -> np.ndarray:
    """Bytes of a dtype in `WIDENED` as float32 [n]."""
    if code == "BF16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    return raw.view("<f2").astype("<f4") if code == "F16" else raw.view("<f4")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in a dtype of `DTYPES`, to nearest, ties to even. bfloat16 comes as uint16."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    bits = np.ascontiguousarray(values).view("<u4")
    # Adding just under half of the last place kept, or half where that place is odd, carries exactly when rounding up.
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def item_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPES[dtype][1]


def write_tensors(
    path: Path, layout: Mapping[str, tuple[str, tuple[int, ...], int]], data: Iterable[np.ndarray]
) -> int:
    """Write a safetensors file from a stream of arrays. Answers the bytes of all tensors.

    Args:
        layout: safetensors dtype, shape and bytes of each tensor, by name, in the order of `data`.
        data: their bytes, one after the other, cut anywhere.
    """
    index: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (code, shape, size) in layout.items():
        index[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(index, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for piece in data:
            stream.write(piece.data)
        assert stream.tell() == 8 + len(header) + position
    return position
