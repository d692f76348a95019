from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from shared.adapter_file import Layout, header_length, lay_out, parse_header
from shared.errors import ErrorCode, LockstepError
from shared.weights import AdapterManifest, ModuleSpec, WeightVersion


def _blob(rank: int = 2) -> bytes:
    tensors = {
        "m.lora_A.weight": np.arange(rank * 3, dtype="<f4").reshape(rank, 3),
        "m.lora_B.weight": np.ones((4, rank), "<f4"),
    }
    entries = lay_out({name: tensor.shape for name, tensor in tensors.items()}, "float32")
    manifest = AdapterManifest(
        version=WeightVersion(run_id="r", step=0),
        base_weights=None,
        dtype="float32",
        modules={"m": ModuleSpec(rank=rank, scaling=2.0)},
        peft_config={},
        checksum="",
    )
    return Layout(entries).header(manifest) + b"".join(tensor.tobytes() for tensor in tensors.values())


def _parse(blob: bytes):
    return parse_header(blob[8 : 8 + header_length(blob)])


def test_round_trip_and_readable_by_safetensors() -> None:
    blob = _blob()
    header = _parse(blob)
    assert header.total_bytes == len(blob)
    assert load(blob)["m.lora_A.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_headers_are_refused_or_unchanged(data: st.DataObject) -> None:
    """Whatever happens to the header, the parser answers with a LockstepError or the very same content."""
    blob = bytearray(_blob())
    length = header_length(bytes(blob))
    good = _parse(bytes(blob))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LockstepError):
        parsed = _parse(bytes(blob))
        assert {e.name for e in parsed.layout.entries} == {
            e.name for e in good.layout.entries
        } or parsed.manifest != good.manifest


@pytest.mark.parametrize("prefix", [b"", b"\x00" * 8, b"\xff" * 8, b"1234"])
def test_nonsense_lengths(prefix: bytes) -> None:
    with pytest.raises(LockstepError) as refusal:
        header_length(prefix)
    assert refusal.value.code == ErrorCode.MALFORMED_ADAPTER


def test_offsets_with_a_hole_are_refused() -> None:
    blob = _blob()
    document = json.loads(blob[8 : 8 + header_length(blob)])
    for info in list(document.values())[1:]:
        info["data_offsets"] = [offset + 4 for offset in info["data_offsets"]]
    with pytest.raises(LockstepError, match="gap"):
        parse_header(json.dumps(document).encode())
