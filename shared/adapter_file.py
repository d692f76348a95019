"""An adapter on the wire: one safetensors blob whose header carries the manifest.

Layout (safetensors): 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes. The checksum
covers the tensor index of the header and all tensor bytes, so it holds for exactly what will be installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash
from pydantic import ValidationError

from shared.errors import ErrorCode, LockstepError
from shared.weights import AdapterManifest

MANIFEST_KEY = "lockstep_manifest"
MAX_HEADER_BYTES = 16 * 2**20
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class RawTensor:
    """A tensor without a tensor library: row-major little-endian `data` of `shape` in one of `DTYPES`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in the blob: bytes [start, end) after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checksum:
    """xxh3-128 over the tensor index (canonical JSON), then the data bytes in file order."""

    def __init__(self, entries: list[TensorEntry]) -> None:
        index = [[e.name, e.dtype, list(e.shape)] for e in sorted(entries, key=lambda e: e.start)]
        self._hash = xxhash.xxh3_128(json.dumps(index, separators=(",", ":")).encode())

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the data section."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """32 hex digits."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class AdapterHeader:
    """The header of a blob, parsed and found consistent with itself."""

    manifest: AdapterManifest
    entries: list[TensorEntry]
    data_offset: int

    @property
    def total_bytes(self) -> int:
        """Length of the whole blob."""
        return self.data_offset + max(entry.end for entry in self.entries)


def encode_adapter(tensors: Mapping[str, RawTensor], manifest: AdapterManifest) -> list[bytes | memoryview]:
    """Lay out `tensors` and `manifest` as one blob, in pieces that can be sent without joining them.

    The manifest's checksum is filled in. Any safetensors reader can read the joined pieces.
    """
    index: dict[str, dict[str, Any]] = {}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        code = DTYPES[tensor.dtype][0]
        index[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    checksum = Checksum(_entries(index))
    for tensor in tensors.values():
        checksum.update(tensor.data)
    manifest = manifest.model_copy(update={"checksum": checksum.hexdigest()})
    header = json.dumps({"__metadata__": {MANIFEST_KEY: manifest.model_dump_json()}, **index}).encode()
    header += b" " * (-len(header) % 8)
    return [len(header).to_bytes(8, "little"), header, *(tensor.data for tensor in tensors.values())]


def header_length(prefix: bytes) -> int:
    """Length of the JSON header, from the blob's first 8 bytes.

    Raises:
        LockstepError: `malformed_adapter` if it cannot be a header.
    """
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise _malformed("the body is not a safetensors blob: its header length makes no sense")
    return length


def parse_header(header: bytes) -> AdapterHeader:
    """Parse and check the JSON header (without the 8 length bytes).

    Raises:
        LockstepError: `malformed_adapter`, `protocol_mismatch`.
    """
    try:
        document = json.loads(header)
        metadata = document.get("__metadata__", {})
        raw_manifest = json.loads(metadata[MANIFEST_KEY])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(f"the safetensors header holds no readable {MANIFEST_KEY!r}: {error!r}") from error
    protocol = raw_manifest.get("protocol") if isinstance(raw_manifest, dict) else None
    expected = AdapterManifest.model_fields["protocol"].default
    if protocol != expected:
        raise LockstepError(
            ErrorCode.PROTOCOL_MISMATCH,
            f"the push speaks protocol {protocol}, this server {expected}; install the same lockstep-rl on both sides",
        )
    try:
        manifest = AdapterManifest.model_validate(raw_manifest)
        entries = _entries(document)
    except ValidationError as error:
        raise _malformed(f"the manifest does not fit its schema: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(f"the tensor index of the header is broken: {error!r}") from error
    _check_entries(manifest, entries)
    return AdapterHeader(manifest, entries, data_offset=8 + len(header))


def _entries(document: dict[str, Any]) -> list[TensorEntry]:
    return [
        TensorEntry(
            name=name,
            dtype=str(info["dtype"]),
            shape=tuple(int(size) for size in info["shape"]),
            start=int(info["data_offsets"][0]),
            end=int(info["data_offsets"][1]),
        )
        for name, info in document.items()
        if name != "__metadata__"
    ]


def _check_entries(manifest: AdapterManifest, entries: list[TensorEntry]) -> None:
    """Names, dtypes, ranks and offsets agree with the manifest and leave no gap."""
    wanted = {name + suffix for name in manifest.modules for suffix in (LORA_A, LORA_B)}
    names = {entry.name for entry in entries}
    if names != wanted:
        missing, unknown = sorted(wanted - names)[:3], sorted(names - wanted)[:3]
        raise _malformed(f"tensors and manifest disagree: missing {missing}, not announced {unknown}")
    code, item_bytes = DTYPES[manifest.dtype]
    position = 0
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.dtype != code or len(entry.shape) != 2 or min(entry.shape) < 1:
            raise _malformed(f"{entry.name} is {entry.dtype}{list(entry.shape)}, announced were {code} matrices")
        if entry.start != position or entry.end - entry.start != item_bytes * math.prod(entry.shape):
            raise _malformed(
                f"{entry.name}: its bytes [{entry.start}, {entry.end}) do not fit its shape or leave a gap"
            )
        position = entry.end
        module, rank_axis = (
            (entry.name.removesuffix(LORA_A), 0)
            if entry.name.endswith(LORA_A)
            else (entry.name.removesuffix(LORA_B), 1)
        )
        rank = manifest.modules[module].rank
        if entry.shape[rank_axis] != rank:
            raise LockstepError(
                ErrorCode.SHAPE_MISMATCH, f"{entry.name} has shape {list(entry.shape)}, its announced rank is {rank}"
            )


def _malformed(message: str) -> LockstepError:
    return LockstepError(ErrorCode.MALFORMED_ADAPTER, message)
