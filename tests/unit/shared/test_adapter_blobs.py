"""Broken adapter blobs against the parser: it refuses with a LockstepError, or another reader takes them, too."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, settings

from shared.adapter_file import Layout, header_length, lay_out, parse_header
from shared.weights import AdapterManifest, ModuleSpec, WeightVersion
from tests.fuzz.blobs import blobs, digest_of, is_right, parses, put_together, take_apart

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # 0: the same few hundred each time


def make_good() -> bytes:
    shapes = {
        f"model.layers.{i}.up_proj.lora_{ab}.weight": shape
        for i in range(2)
        for ab, shape in (("A", (2, 3)), ("B", (4, 2)))
    }
    manifest = AdapterManifest(
        version=WeightVersion(run_id="r", step=0),
        base_weights=None,
        dtype="float32",
        modules={f"model.layers.{i}.up_proj": ModuleSpec(rank=2, scaling=2.0) for i in range(2)},
        peft_config={},
        checksum="",
    )
    header = Layout(lay_out(shapes, "float32")).header(manifest)
    document, fields, data = take_apart(header + np.linspace(-1, 1, 28, dtype="<f4").tobytes())
    fields["checksum"] = digest_of(document, data)
    return put_together(document, fields, bytes(data))


def next_version() -> dict[str, Any]:
    return {"run_id": "r", "fence": 0, "step": 1}


def test_the_blob_that_all_are_made_of_is_right() -> None:
    assert is_right(make_good())
    assert parses(make_good())


@settings(
    max_examples=EXAMPLES or 300, derandomize=not EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(blob=blobs(make_good(), next_version))
def test_a_broken_blob_is_refused_or_another_reader_takes_it(blob: bytes) -> None:
    if parses(blob):
        header = parse_header(blob[8 : 8 + header_length(blob)])
        if header.total_bytes == len(blob):
            tensors = safetensors.numpy.load(blob)
            assert {name: tensor.shape for name, tensor in tensors.items()} == {
                entry.name: entry.shape for entry in header.layout.entries
            }
