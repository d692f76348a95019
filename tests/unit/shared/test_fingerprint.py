from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.fingerprint import fingerprint_checkpoint


def _checkpoint(folder: Path, files: dict[str, dict[str, np.ndarray]], **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "hidden_size": 8, **config}))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    return folder


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=(50, 8)).astype("f2") for name in ("a", "b", "c")}


def test_same_weights_in_other_files_and_a_wider_dtype(tmp_path: Path, weights: dict) -> None:
    one = fingerprint_checkpoint(str(_checkpoint(tmp_path / "one", {"model.safetensors": weights})))
    split = {"model-1.safetensors": {"a": weights["a"]}, "model-2.safetensors": {k: weights[k] for k in "bc"}}
    two = fingerprint_checkpoint(str(_checkpoint(tmp_path / "two", split, torch_dtype="float16")))
    wide = {"model.safetensors": {name: value.astype("f4") for name, value in weights.items()}}
    three = fingerprint_checkpoint(str(_checkpoint(tmp_path / "three", wide)))
    assert one.weights == two.weights == three.weights is not None


def test_other_weights_shape_name_or_architecture_differ(tmp_path: Path, weights: dict) -> None:
    def of(name: str, tensors: dict, **config) -> str | None:
        return fingerprint_checkpoint(str(_checkpoint(tmp_path / name, {"m.safetensors": tensors}, **config))).weights

    changed = {**weights, "b": weights["b"] + np.float16(0.25)}
    digests = {
        of("same", weights),
        of("value", changed),
        of("shape", {**weights, "a": weights["a"].reshape(8, 50)}),
        of("name", {**{k: weights[k] for k in "ab"}, "d": weights["c"]}),
        of("config", weights, hidden_size=16),
    }
    text = [of(f"text{size}", weights, text_config={"hidden_size": size}) for size in (8, 16)]  # of a multimodal model
    assert len(digests) == 5
    assert text[0] != text[1]
    assert None not in digests


def test_nothing_to_read_is_none(tmp_path: Path) -> None:
    fingerprint = fingerprint_checkpoint(str(tmp_path))
    assert fingerprint.weights is fingerprint.tokenizer is fingerprint.chat_template is None
