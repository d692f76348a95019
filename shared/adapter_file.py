"""An adapter on the wire: one safetensors blob whose header carries the manifest.

Layout (safetensors): 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes without gaps.
Over a collective group the header goes over HTTP and the tensors' bytes as one broadcast. The checksum covers the
tensor index of the header and all tensor bytes: see `shared.checksum`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash
from pydantic import ValidationError

from shared.bounded_json import JsonLimits
from shared.errors import MalformedAdapter, ProtocolMismatch, ShapeMismatch
from shared.weights import AdapterManifest

MANIFEST_KEY = "lockstep_manifest"
MAX_HEADER_BYTES = 16 * 2**20
_LIMITS = JsonLimits(values=2**21, strings=2**20, containers=2**20)
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


class TensorEntry(NamedTuple):
    """Place of a tensor in the blob: bytes [start, end) after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def lay_out(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[TensorEntry]:
    """Place tensors of `shapes` one after the other, in this order."""
    code, item_bytes = DTYPES[dtype]
    entries, position = [], 0
    for name, shape in shapes.items():
        end = position + item_bytes * math.prod(shape)
        entries.append(TensorEntry(name, code, tuple(shape), position, end))
        position = end
    return entries


@dataclass(frozen=True)
class Layout:
    """Names, shapes and dtype of an adapter's tensors, in the order of their bytes: the same from push to push."""

    entries: Sequence[TensorEntry]

    @functools.cached_property
    def index(self) -> bytes:
        """Names, dtypes and shapes as canonical JSON."""
        return json.dumps([[e.name, e.dtype, list(e.shape)] for e in self.entries], separators=(",", ":")).encode()

    @functools.cached_property
    def key(self) -> str:
        """Key that is equal for all adapters with the same tensors in the same order."""
        return xxhash.xxh3_128_hexdigest(self.index)

    @functools.cached_property
    def _file_index(self) -> bytes:
        return json.dumps(
            {e.name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.end]} for e in self.entries}
        ).encode()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.entries[-1].end

    def header(self, manifest: AdapterManifest) -> bytes:
        """Return the blob up to its tensors: length and JSON, which any safetensors reader can read."""
        metadata = json.dumps({MANIFEST_KEY: manifest.model_dump_json()}).encode()
        header = b'{"__metadata__":%s,%s' % (metadata, self._file_index[1:])
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header


@dataclass(frozen=True)
class AdapterHeader:
    """Header of a blob, parsed and consistent."""

    manifest: AdapterManifest
    layout: Layout
    data_offset: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the complete blob."""
        return self.data_offset + self.layout.nbytes


def header_length(prefix: bytes) -> int:
    """Return the length of the JSON header from the blob's first 8 bytes; raises `malformed_adapter`."""
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise MalformedAdapter("the body is not a safetensors blob: its header length makes no sense")
    return length


def parse_header(header: bytes) -> AdapterHeader:
    """Parse and check the JSON header, without the 8 length bytes.

    Raises `malformed_adapter`, `protocol_mismatch`, `shape_mismatch`.
    """
    try:
        document = _load(header)
        metadata = document.get("__metadata__", {})
        raw_manifest = _load(metadata[MANIFEST_KEY].encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedAdapter(f"the safetensors header holds no readable {MANIFEST_KEY!r}: {error!r}") from error
    protocol = raw_manifest.get("protocol") if isinstance(raw_manifest, dict) else None
    expected = AdapterManifest.model_fields["protocol"].default
    if protocol != expected:
        raise ProtocolMismatch(
            f"the push speaks protocol {protocol}, this server {expected}; install the same lockstep-rl on both sides"
        )
    try:
        manifest = AdapterManifest.model_validate(raw_manifest)
        entries = [
            TensorEntry(name, info["dtype"], tuple(_integers(info["shape"])), *_integers(info["data_offsets"]))
            for name, info in document.items()
            if name != "__metadata__"
        ]
    except ValidationError as error:
        raise MalformedAdapter(f"the manifest does not fit its schema: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAdapter(f"the tensor index of the header is broken: {error!r}") from error
    _check_entries(manifest, entries)
    return AdapterHeader(manifest, Layout(sorted(entries, key=lambda e: e.start)), data_offset=8 + len(header))


def _load(document: bytes) -> Any:
    _LIMITS.check(document)
    return json.loads(document, object_pairs_hook=_each_key_once)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys: readers differ in which of them they take."""
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key comes twice")
    for key in document:
        key.encode()  # JSON can hold halves of characters, which no other reader takes
    return document


def _integers(values: Any) -> list[int]:
    """Return `values` if they are two sizes: integers, which 1.0, "1", true and Infinity are not."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TypeError(f"{values!r:.200} is no list of sizes")
    return values


def _check_entries(manifest: AdapterManifest, entries: list[TensorEntry]) -> None:
    """Check names, dtypes, ranks and offsets against the manifest, and that there is no gap."""
    wanted = {name + suffix for name in manifest.modules for suffix in (LORA_A, LORA_B)}
    names = {entry.name for entry in entries}
    if names != wanted:
        missing, unknown = sorted(wanted - names)[:3], sorted(names - wanted)[:3]
        raise MalformedAdapter(f"tensors and manifest disagree: missing {missing}, not announced {unknown}")
    code, item_bytes = DTYPES[manifest.dtype]
    position = 0
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.dtype != code or len(entry.shape) != 2 or min(entry.shape) < 1:
            raise MalformedAdapter(f"{entry.name} is {entry.dtype}{list(entry.shape)}, announced were {code} matrices")
        if entry.start != position or entry.end - entry.start != item_bytes * math.prod(entry.shape):
            place = f"[{entry.start}, {entry.end})"
            raise MalformedAdapter(f"{entry.name}: its bytes {place} do not fit its shape or leave a gap")
        position = entry.end
        is_a = entry.name.endswith(LORA_A)
        rank = manifest.modules[entry.name.removesuffix(LORA_A if is_a else LORA_B)].rank
        if entry.shape[0 if is_a else 1] != rank:
            raise ShapeMismatch(f"{entry.name} has shape {list(entry.shape)}, its announced rank is {rank}")
