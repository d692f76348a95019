"""Fingerprint of a base model, read from its checkpoint files before anything is loaded or quantized.

The weights' fingerprint covers the architecture and, for every tensor, its name, shape and a fixed sample of its
elements (widened to float32, so that the dtype a copy was saved in does not matter where the values are the same).
It does not depend on how tensors are spread over files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shared.model_files import NOT_LOADED, processor_template, weight_files
from shared.weights import BaseFingerprint

_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ARCHITECTURE_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "hidden_act",
    "quantization_config",
)


def fingerprint_checkpoint(model: str, revision: str | None = None) -> BaseFingerprint:
    """Return the fingerprint of a local checkpoint directory, or of a hub repository (downloaded or cached).

    Parts that cannot be read (no safetensors files, no tokenizer) are None; a None never matches anything.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            patterns = ["*.safetensors", "*.json", "*.jinja"]
            folder = Path(
                snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=[*NOT_LOADED])
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
            return BaseFingerprint(weights=None, tokenizer=None, chat_template=None)
    return BaseFingerprint(weights=_weights(folder), tokenizer=_tokenizer(folder), chat_template=_chat_template(folder))


def _weights(folder: Path) -> str | None:
    files = weight_files(folder)
    config_file = folder / "config.json"
    if not files or not config_file.is_file():
        return None
    digests = {name: digest for path in files for name, digest in _tensor_digests(path).items()}
    config = json.loads(config_file.read_text())
    text = config.get("text_config")  # of a multimodal model
    described = config | text | {"architectures": config.get("architectures")} if isinstance(text, dict) else config
    architecture = {key: described[key] for key in _ARCHITECTURE_KEYS if described.get(key) is not None}
    document = json.dumps([architecture, sorted(digests.items())], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(document.encode())


def _tensor_digests(path: Path) -> dict[str, str]:
    """Return name -> digest of (shape, sampled elements) for every tensor of one file."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    digests = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        item_bytes = _ITEM_BYTES.get(info["dtype"], 1)
        start, end = info["data_offsets"]
        count = (end - start) // item_bytes
        # 32 elements, evenly spread, first and last included; independent of file layout.
        indices = np.unique(np.linspace(0, max(count - 1, 0), 32).astype(np.int64))
        raw = b"".join(bytes(data[start + i * item_bytes : start + (i + 1) * item_bytes]) for i in indices if count)
        shape = json.dumps([name, info["shape"], math.prod(info["shape"])])
        if info["dtype"] == "BF16":
            raw = (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).tobytes()
        if info["dtype"] == "F16":
            raw = np.frombuffer(raw, dtype="<f2").astype("<f4").tobytes()
        digests[name] = xxhash.xxh3_64_hexdigest(shape.encode() + raw)
    return digests


def _tokenizer(folder: Path) -> str | None:
    """Digest the mapping of text to ids: vocabulary, merges and added tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    kept = {key: document.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())


def _chat_template(folder: Path) -> str | None:
    """Digest the tokenizer's template, and the processor's if it has another."""
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    own: Any = None
    if jinja.is_file():
        own = jinja.read_text(encoding="utf-8")
    elif config.is_file():
        own = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    processors = processor_template(str(folder))
    used = own or processors
    if processors and processors != used:
        used = [own, processors]
    text = used if isinstance(used, str) or not used else json.dumps(used)
    return xxhash.xxh3_128_hexdigest(text.encode()) if text else None
