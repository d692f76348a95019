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


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _indexed(folder: Path, weights: dict) -> Path:
    split = {SHARDS[0]: {"a": weights["a"]}, SHARDS[1]: {k: weights[k] for k in "bc"}}
    _checkpoint(folder, split)
    weight_map = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_files_that_are_not_the_models_are_left_out(tmp_path: Path, weights: dict) -> None:
    ordinary = fingerprint_checkpoint(str(_checkpoint(tmp_path / "one", {"model.safetensors": weights}))).weights
    other = {"layers.0.a": weights["a"]}
    beside_one = {"model.safetensors": weights, "consolidated.safetensors": other, SHARDS[1]: other}
    _indexed(tmp_path / "shards", weights)
    for name in ("consolidated.safetensors", "model-00003-of-00003.safetensors", "model.safetensors"):
        save_file(other, tmp_path / "shards" / name)
    beside_unnamed = {"a.safetensors": weights, "consolidated-00001-of-00001.safetensors": other}
    folders = [
        _checkpoint(tmp_path / "beside_one", beside_one),
        tmp_path / "shards",
        _checkpoint(tmp_path / "beside_unnamed", {**beside_unnamed, "adapter_model.safetensors": other}),
    ]
    assert [fingerprint_checkpoint(str(folder)).weights for folder in folders] == [ordinary] * 3


def test_an_index_without_its_shards_does_not_count(tmp_path: Path, weights: dict) -> None:
    _indexed(tmp_path / "left", weights)
    whole = fingerprint_checkpoint(str(tmp_path / "left")).weights
    for name in SHARDS:  # `save_pretrained` of transformers removes them, but not their index
        (tmp_path / "left" / name).unlink()
    save_file(weights, tmp_path / "left" / "model.safetensors")
    assert fingerprint_checkpoint(str(tmp_path / "left")).weights == whole


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path: Path) -> None:
    tensors = {"a": np.arange(400, dtype="f2").reshape(50, 8)}
    folder = _checkpoint(tmp_path / "one", {"model.safetensors": tensors})
    known = "966d1b82e26e4965638a934a2939fa6a"  # pragma: allowlist secret
    assert fingerprint_checkpoint(str(folder)).weights == known


def test_a_chat_template_counts_wherever_it_is(tmp_path: Path) -> None:
    def of(name: str, **files: object) -> str | None:
        (tmp_path / name).mkdir()
        for stem, content in files.items():
            (tmp_path / name / f"{stem}.json").write_text(json.dumps(content))
        return fingerprint_checkpoint(str(tmp_path / name)).chat_template

    (tmp_path / "chat_template.jinja").write_text("a é")
    one, other = {"chat_template": "a é"}, {"chat_template": "b"}
    same = [
        fingerprint_checkpoint(str(tmp_path)).chat_template,
        of("tokenizer", tokenizer_config=one),
        of("processor", chat_template=one, tokenizer_config={}),
        of("settings", processor_config=one),
        of("both", chat_template=one, tokenizer_config=one),
    ]
    named = {"chat_template": [{"name": "default", "template": "a"}]}
    differing = {
        same[0],
        of("other", chat_template=other),
        of("beside", chat_template=other, tokenizer_config=one),
        of("the_other", chat_template=one, tokenizer_config=other),
        of("named", tokenizer_config=named),
    }
    assert len(set(same)) == 1
    assert len(differing) == 5
    assert None not in differing


def test_nothing_to_read_is_none(tmp_path: Path) -> None:
    fingerprint = fingerprint_checkpoint(str(tmp_path))
    assert fingerprint.weights is fingerprint.tokenizer is fingerprint.chat_template is None
