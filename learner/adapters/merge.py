"""Merge an adapter into its base checkpoint: W0 + s·B·A in float32, rounded once, one shard at a time.

To bfloat16 it is rounded stochastically (`shared.rounding`): to nearest, most of a small update would be lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from learner.adapters.quantization import FOUR_BIT
from learner.adapters.stored import FLOATS, PROCESSOR_FILES, StoredAdapter, copy_code, copy_files, open_tensors
from shared.errors import InvalidRequest, ShapeMismatch, UnsupportedAdapter
from shared.model_files import INDEX_FILE, ONE_FILE
from shared.module_names import relative_name
from shared.rounding import CUT_BITS, Arrived, rounding_seed

_BLOCK_ELEMENTS = 2**24  # bounds the memory of float32 copies


def merge(base: Path, adapter: StoredAdapter, out: Path, dtype: str) -> Arrived:
    """Write the merged model's weights and configuration into `out`, in as many shards as the base has.

    Return how much of the update is in its weights.

    Holds one merged shard in memory. Tensors without an adapter are rounded to `dtype` too; those of other types than
    float32, bfloat16 and float16 are copied. Raises `unsupported_adapter` for a quantized base, `shape_mismatch` if the
    adapter does not fit it, `malformed_adapter` if a file of the base is not safetensors.
    """
    config, shards = _open_base(base)
    modules = _check_fit(adapter, shards)
    weight_map: dict[str, str] = {}
    total, arrived = 0, Arrived()
    for number, shard in enumerate(shards, 1):
        name = ONE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        size, sums = _write_shard(shard, adapter, modules, out / name, dtype)
        total, arrived = total + size, arrived.plus(sums)
        weight_map |= dict.fromkeys(shard.keys(), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    config.pop("torch_dtype", None)  # an older name of `dtype`
    config.pop(FOUR_BIT, None)  # merged weights do not fit into four bits
    config["dtype"] = dtype
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_code(base, out, config)
    copy_files(base, out, ("generation_config.json", *PROCESSOR_FILES))
    return arrived


def _open_base(base: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return a base's config.json and its open shards."""
    try:
        config = json.loads((base / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{base} is not a model directory: {error}") from error
    if config.get("quantization_config"):
        raise UnsupportedAdapter(
            f"{base} is quantized, and rounding an adapter to its few bits would lose it: name the checkpoint that "
            "it was quantized from with --model_name_or_path, or export the adapter alone (without --merge)"
        )
    names = [ONE_FILE]
    if (base / INDEX_FILE).is_file():
        names = sorted(set(json.loads((base / INDEX_FILE).read_text())["weight_map"].values()))
    elif not (base / ONE_FILE).is_file():
        raise InvalidRequest(
            f"{base} has neither {INDEX_FILE} nor {ONE_FILE}: load it with transformers and save_pretrained() it first"
        )
    return config, [open_tensors(base / name) for name in names]


def _check_fit(adapter: StoredAdapter, shards: list[Any]) -> dict[str, str]:
    """Check that every adapted module has a weight of its own in the base, of the adapter's shape.

    Return the name of each such weight -> its module, whose names differ in multimodal checkpoints.
    """
    weights = {name: shard.get_slice(name) for shard in shards for name in shard.keys()}  # noqa: SIM118
    stored = {relative_name(name): name for name in weights}
    found = {}
    for module in adapter.modules:
        name = module + ".weight"
        name = name if name in weights else stored.get(relative_name(name), name)
        found[name] = module
        if name not in weights:
            raise UnsupportedAdapter(
                f"the base has no weight {name} of its own (tied to another, or stored under another name), so the "
                f"adapter of {adapter.folder} cannot be merged into it; export it without --merge"
            )
        a_RI, b_OR = adapter.pair(module)
        shape, code = weights[name].get_shape(), weights[name].get_dtype()
        if shape != [len(b_OR), a_RI.shape[1]] or code not in FLOATS:
            raise ShapeMismatch(
                f"{name} of the base is {code}{shape}, its adapter in {adapter.folder} for "
                f"floats of [{len(b_OR)}, {a_RI.shape[1]}]; name its own base with --model_name_or_path"
            )
    return found


def _write_shard(
    shard: Any, adapter: StoredAdapter, modules: dict[str, str], path: Path, dtype: str
) -> tuple[int, Arrived]:
    """Write one file of the merged model. Return the bytes of its tensors, and how much of the updates is in them."""
    tensors, torch_dtype, arrived = {}, getattr(torch, dtype), Arrived()
    for name in shard.keys():  # noqa: SIM118
        tensor = shard.get_tensor(name)
        if module := modules.get(name):
            a_RI, b_OR = adapter.pair(module)
            base_OI, tensor = tensor, torch.empty_like(tensor, dtype=torch_dtype)
            rows = max(_BLOCK_ELEMENTS // a_RI.shape[1], 1)
            generator = np.random.default_rng(rounding_seed(xxhash.xxh3_64_hexdigest(b_OR.numpy()), name))
            for merged, weight, b in zip(tensor.split(rows), base_OI.split(rows), b_OR.split(rows), strict=True):
                # NumPy multiplies in float32 always; torch in TF32 on some CPUs, if the training in this process
                # allowed that.
                delta = torch.from_numpy(b.numpy() @ a_RI.numpy()) * adapter.modules[module].scaling
                _round(weight.float() + delta, merged, generator)
                made = merged.double() - weight.double()
                sums = ((made * delta).sum(), delta.double().square().sum(), (made - delta).square().sum())
                arrived = arrived.plus(Arrived(*(each.item() for each in sums)))
        elif shard.get_slice(name).get_dtype() in FLOATS:
            tensor = tensor.to(torch_dtype)
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values()), arrived


def _round(exact: torch.Tensor, target: torch.Tensor, generator: np.random.Generator) -> None:
    """Set `target` to `exact` (float32): to bfloat16 stochastically, to other types by their nearest values."""
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    noise = generator.integers(2**CUT_BITS, size=exact.shape, dtype=np.int32)
    target.view(torch.int16).copy_(torch.from_numpy((exact.numpy().view(np.int32) + noise) >> CUT_BITS))
