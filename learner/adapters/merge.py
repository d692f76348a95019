"""A base checkpoint with an adapter in its weights: W0 + s·B·A in float32, rounded once, a block of rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from learner.adapters.quantization import FOUR_BIT
from learner.adapters.safetensors_file import WIDENED, TensorFile, item_bytes, rounded, widened, write_tensors
from learner.adapters.stored import StoredAdapter
from shared.adapter_file import DTYPES
from shared.errors import InvalidRequest, ShapeMismatch, UnsupportedAdapter

INDEX_FILE, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
#: What tells a text how to become token ids, and back; the weights aside, all of a model that is copied as it is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIG_FILE, _GENERATION_FILE = "config.json", "generation_config.json"
_BLOCK_ELEMENTS = 2**24  # converted at a time: bounds the memory


def fetch_base(name: str, revision: str | None = None) -> Path:
    """Directory of a base model: `name` itself, or the hub's repository (cached or downloaded).

    Raises:
        LockstepError: `invalid_request` if there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", *TOKENIZER_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InvalidRequest(
            f"the base model {name!r} is no directory here and cannot be had from the hub "
            f"({str(error).splitlines()[0]}); name it with --model_name_or_path"
        ) from error


def merge(base: Path, adapter: StoredAdapter, out: Path, dtype: str) -> int:
    """Write the merged model's weights and settings into `out`, as many files as the base has. Answers their bytes.

    Tensors without an adapter are rounded to `dtype` as well, those that hold no floats stay as they are.

    Raises:
        LockstepError: `unsupported_adapter` for a quantized base, `shape_mismatch` if the adapter does not fit it.
    """
    config = _config(base)
    files = [TensorFile(path) for path in _weight_files(base)]
    _check_fit(adapter, files)
    shards: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = ONE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        layout = {entry.name: _laid_out(entry, dtype) for entry in file.entries.values()}
        total += write_tensors(out / name, layout, _merged(file, adapter, dtype))
        shards |= dict.fromkeys(layout, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.items()))}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    config.pop("torch_dtype", None)  # what `dtype` was called before
    config.pop(FOUR_BIT, None)  # merged weights are no longer those of four bits
    (out / _CONFIG_FILE).write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    copy_files(base, out, (_GENERATION_FILE,))
    return total


def copy_files(source: Path, out: Path, names: tuple[str, ...]) -> None:
    """Those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _config(base: Path) -> dict[str, Any]:
    try:
        config = json.loads((base / _CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{base} is no model directory: {error}") from error
    if config.get("quantization_config"):
        raise UnsupportedAdapter(
            f"{base} is quantized, and rounding an adapter into its few bits would lose it: name the checkpoint that "
            "it was quantized from with --model_name_or_path, or export the adapter alone (without --merge)"
        )
    return config


def _weight_files(base: Path) -> list[Path]:
    if (base / INDEX_FILE).is_file():
        return [base / name for name in sorted(set(json.loads((base / INDEX_FILE).read_text())["weight_map"].values()))]
    if (base / ONE_FILE).is_file():
        return [base / ONE_FILE]
    raise InvalidRequest(
        f"{base} has neither {INDEX_FILE} nor {ONE_FILE}: load it with transformers and save_pretrained() it first"
    )


def _check_fit(adapter: StoredAdapter, files: list[TensorFile]) -> None:
    """Every adapted module has a weight of its own in the base, of the adapter's shape."""
    weights = {name: entry for file in files for name, entry in file.entries.items()}
    for module in adapter.modules:
        weight = weights.get(module + ".weight")
        if weight is None:
            raise UnsupportedAdapter(
                f"the base has no weight {module}.weight of its own (tied to another, or named otherwise in its "
                f"files), so the adapter of {adapter.folder} cannot be merged into it; export it without --merge"
            )
        a, b = adapter.pair(module)
        if weight.shape != (b.shape[0], a.shape[1]) or weight.dtype not in WIDENED:
            raise ShapeMismatch(
                f"{weight.name} of the base is {weight.dtype}{list(weight.shape)}, its adapter in {adapter.folder} for "
                f"floats of [{b.shape[0]}, {a.shape[1]}]; name its own base with --model_name_or_path"
            )


def _laid_out(entry: Any, dtype: str) -> tuple[str, tuple[int, ...], int]:
    if entry.dtype not in WIDENED:
        return entry.dtype, entry.shape, entry.end - entry.start
    return DTYPES[dtype][0], entry.shape, int(np.prod(entry.shape, dtype=np.int64)) * item_bytes(dtype)


def _merged(file: TensorFile, adapter: StoredAdapter, dtype: str) -> Iterator[np.ndarray]:
    """The bytes of a file's tensors, in the order of its header, with the adapter added and in `dtype`."""
    for entry in file.entries.values():
        raw = file.raw(entry.name)
        module = entry.name.removesuffix(".weight")
        adapted = module in adapter.modules and entry.name != module
        if entry.dtype not in WIDENED or (entry.dtype == DTYPES[dtype][0] and not adapted):
            yield raw
            continue
        flat = _blocks(raw, entry.dtype, entry.shape[-1] if entry.shape else 1)
        if not adapted:
            yield from (rounded(block, dtype) for block in flat)
            continue
        a_RI, b_OR = adapter.pair(module)
        first = 0
        for block in flat:
            rows = len(block) // a_RI.shape[1]
            delta = (b_OR[first : first + rows] @ a_RI) * np.float32(adapter.modules[module].scaling)
            yield rounded(block + delta.reshape(-1), dtype)
            first += rows


def _blocks(raw: np.ndarray, code: str, row: int) -> Iterator[np.ndarray]:
    """A tensor's bytes as float32, some whole rows of `row` elements at a time."""
    step = max(_BLOCK_ELEMENTS // max(row, 1), 1) * max(row, 1) * (4 if code == "F32" else 2)
    for start in range(0, len(raw), step):
        yield widened(raw[start : start + step], code)
