"""Adapter blobs with one or several defects, made from a valid one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from shared.adapter_file import MANIFEST_KEY, Layout, TensorEntry, header_length, parse_header
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import LockstepError
from tests.fuzz.wild import wild_numbers, wild_texts, wild_values

Parts = tuple[dict[str, Any], dict[str, Any], bytearray]  # header document, manifest, tensor bytes


def take_apart(blob: bytes) -> Parts:
    """Split a valid blob into parts that can be changed."""
    length = header_length(blob)
    document = json.loads(blob[8 : 8 + length])
    return document, json.loads(document["__metadata__"][MANIFEST_KEY]), bytearray(blob[8 + length :])


def put_together(document: dict[str, Any], manifest: Any, data: bytes) -> bytes:
    """Assemble a blob; omit the manifest if its key was removed."""
    metadata = document.get("__metadata__")
    if isinstance(metadata, dict) and MANIFEST_KEY in metadata:
        metadata[MANIFEST_KEY] = json.dumps(manifest)
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + data


def digest_of(document: dict[str, Any], data: bytes) -> str:
    """Return the correct checksum of a float32 blob, without the parser under test."""
    entries = [
        TensorEntry(name, info["dtype"], tuple(info["shape"]), *info["data_offsets"])
        for name, info in document.items()
        if name != "__metadata__"
    ]
    elements = np.frombuffer(bytes(data), "<i4")
    sums = b"".join(part.astype("<i8").tobytes() for part in block_sums(elements, block_weights()))
    return checksum(Layout(sorted(entries, key=lambda entry: entry.start)).index, sums)


def is_right(blob: bytes) -> bool:
    """Return whether a blob is readable by another safetensors reader, finite, and matches its checksum."""
    try:
        tensors = safetensors.numpy.load(blob)
        document, manifest, data = take_apart(blob)
        return all(np.isfinite(t).all() for t in tensors.values()) and digest_of(document, data) == manifest["checksum"]
    except Exception:
        return False


def parses(blob: bytes) -> bool:
    """Return whether the parser accepts the header; it may refuse it with a LockstepError only."""
    try:
        parse_header(blob[8 : 8 + header_length(blob[:8])])
    except LockstepError as error:
        error.body().model_dump_json()
        return False
    return True


@st.composite
def blobs(draw: st.DrawFn, good: bytes, version: Callable[[], dict[str, Any]]) -> bytes:
    """Draw a blob of the next version, with up to three changes to its header, tensors or bytes."""
    document, manifest, data = copy.deepcopy(take_apart(good))
    manifest["version"] = version()
    changes = draw(st.lists(st.sampled_from(_CHANGES), max_size=2))
    for change in changes:
        change(draw, document, manifest, data)
    if changes and draw(st.booleans()):  # a defect with a matching checksum gets further
        try:
            manifest["checksum"] = digest_of(document, data)
        except Exception:
            manifest["checksum"] = "0" * 32
    blob = put_together(document, manifest, bytes(data))
    for damage in draw(st.lists(st.sampled_from(_DAMAGES), max_size=1)):
        blob = damage(draw, blob)
    return blob


def _tensor(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """Draw the index entry of one tensor; an empty one if none is left."""
    entries = [info for name, info in document.items() if name != "__metadata__" and isinstance(info, dict)]
    return draw(st.sampled_from(entries)) if entries else {}


def _offsets(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    bound = st.one_of(wild_numbers, st.integers(-8, len(data) + 8))
    _tensor(draw, document)["data_offsets"] = draw(st.one_of(st.lists(bound, max_size=3), st.tuples(bound, bound)))


def _overlap(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    _tensor(draw, document)["data_offsets"] = _tensor(draw, document).get("data_offsets", [0, 0])


def _shape(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    tensor = _tensor(draw, document)
    shape = draw(st.one_of(st.lists(wild_numbers, max_size=3), wild_values, st.just("same bytes")))
    old = tensor.get("shape")
    if shape == "same bytes" and isinstance(old, list) and len(old) == 2:
        shape = old[::-1]
    tensor["shape"] = shape


def _dtype(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    code = draw(st.one_of(st.sampled_from(["F16", "BF16", "F64", "I32", "f32", "U8"]), wild_values))
    tensors = [info for name, info in document.items() if name != "__metadata__" and isinstance(info, dict)]
    for info in tensors if draw(st.booleans()) else [_tensor(draw, document)]:
        info["dtype"] = code


def _rename(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    """Rename a module in the index and (mostly) in the manifest."""
    modules = manifest.get("modules")
    names = [name for name in document if name.endswith(".lora_A.weight")]
    if not names or not isinstance(modules, dict):
        return
    old = draw(st.sampled_from(names)).removesuffix(".lora_A.weight")
    new = draw(st.one_of(wild_texts, st.sampled_from(["model.layers.9.mlp.up_proj", "lm_head", "m" * 200_000, "a/b"])))
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if old + suffix in document:
            document[new + suffix] = document.pop(old + suffix)
    if old in modules and draw(st.integers(0, 3)):
        modules[new] = modules.pop(old)


def _remove(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    document.pop(draw(st.sampled_from(list(document))))


def _unknown(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    document[draw(wild_texts)] = draw(wild_values)


def _thousands(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    """Add far more modules than the model has, each with tensors."""
    if not isinstance(manifest.get("modules"), dict):
        return
    end = len(data)
    for i in range(draw(st.sampled_from([100, 3000]))):
        name = f"model.layers.{i}.extra"
        manifest["modules"][name] = {"rank": 1, "scaling": 1.0}
        for suffix in (".lora_A.weight", ".lora_B.weight"):
            document[name + suffix] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [end, end + 4]}
            end += 4
    data.extend(bytes(end - len(data)))


def _manifest(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    if manifest:
        manifest[draw(st.sampled_from(sorted(manifest)))] = draw(wild_values)


def _version(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    if isinstance(manifest.get("version"), dict):
        field = draw(st.sampled_from(["run_id", "fence", "step"]))
        # A valid version far ahead would block all later ones.
        numbers = st.one_of(st.integers(max_value=3), st.sampled_from([2**64, 10**400]))
        manifest["version"][field] = draw(st.one_of(wild_texts, numbers, st.none()))


def _module(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    modules = manifest.get("modules")
    if isinstance(modules, dict) and modules:
        spec = modules[draw(st.sampled_from(sorted(modules)))]
        if isinstance(spec, dict):
            spec[draw(st.sampled_from(["rank", "scaling", "alpha"]))] = draw(wild_values)


def _peft(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    name = draw(st.sampled_from(["use_dora", "lora_bias", "modules_to_save", "r", "peft_type", "target_modules"]))
    manifest["peft_config"] = {name: draw(wild_values)}


def _not_finite(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    if len(data) >= 4:
        place = 4 * draw(st.integers(0, len(data) // 4 - 1))
        value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
        data[place : place + 4] = np.float32(value).tobytes()


def _bits(draw: st.DrawFn, document: dict[str, Any], manifest: Any, data: bytearray) -> None:
    if data:
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))


_CHANGES = [
    _offsets,
    _overlap,
    _shape,
    _dtype,
    _rename,
    _remove,
    _unknown,
    _thousands,
    _manifest,
    _version,
    _module,
    _peft,
    _not_finite,
    _bits,
]


def _truncated(draw: st.DrawFn, blob: bytes) -> bytes:
    share = st.integers(0, 1000)  # the length differs slightly between versions
    return blob[: draw(st.one_of(st.integers(0, 40), share.map(lambda share: len(blob) * share // 1000)))]


def _trailing(draw: st.DrawFn, blob: bytes) -> bytes:
    return blob + draw(st.binary(min_size=1, max_size=9)) * draw(st.sampled_from([1, 1, 50_000]))


def _length_lies(draw: st.DrawFn, blob: bytes) -> bytes:
    lengths = [0, 1, 2, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1, max(header_length(blob) - 1, 0), len(blob)]
    return draw(st.sampled_from(lengths)).to_bytes(8, "little") + blob[8:]


def _other_header(draw: st.DrawFn, blob: bytes) -> bytes:
    """Replace the header by one that is not JSON, not UTF-8, too deep, of another form, or has duplicate keys."""
    header = blob[8 : 8 + header_length(blob)]
    other = draw(
        st.sampled_from(
            [
                b"[" * 5000 + b"]" * 5000,
                b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
                b"\xff\xfe" + header,
                b"\x80\x04]q.",
                header.replace(b'"F32"', b'"F32", "dtype": "F32"'),
                header[:-1] + b"," + header[1:],
                b"null",
                b"[]",
                b'"a"',
                b'{"__metadata__":null}',
                b'{"__metadata__":{"lockstep_manifest":"[1]"}}',
                b"1" * 6000,
                header.upper(),
                b'{"__metadata__":{"lockstep_manifest":"' + b"[" * 3000 + b'"}}',
                header.replace(b"[", b"[1e999,", 3),
            ]
        )
    )
    return len(other).to_bytes(8, "little") + other + blob[8 + len(header) :]


def _scattered(draw: st.DrawFn, blob: bytes) -> bytes:
    bytes_of = bytearray(blob)
    for _ in range(draw(st.integers(1, 5)) if blob else 0):
        bytes_of[draw(st.integers(0, min(len(blob), 6000) - 1))] = draw(st.integers(0, 255))
    return bytes(bytes_of)


_DAMAGES = [_truncated, _trailing, _length_lies, _other_header, _scattered]
