"""The served model's linear layers in plain terms: names, fused parts, tensor-parallel shards, live weights.

A linear layer of vLLM holds its weight as [out, in]. A fused layer (q, k, v of `qkv_proj`) stacks the parts of several
modules; with tensor parallelism each worker holds some rows of each part, or some columns of all rows.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch

from shared.module_names import is_of_encoder


class Part(NamedTuple):
    """One fused part of a layer: this worker holds `rows` of its `total` output features, starting with `first`."""

    rows: int
    first: int
    total: int


#: Modules that are several parts of a fused layer among others: query, key and value of a gated delta net (Qwen3.5),
#: whose layer has its gate, too.
_PARTS = {"in_proj_qkv": 3}


class ModuleShape(NamedTuple):
    """Features of a module over all workers, and the highest rank of its adapters.

    `parts` are modules that together are this one: transformers may have a fused layer as one, whatever vLLM's mapping
    says of it (GLM-4's `gate_up_proj`). An adapter has the one or the others.
    """

    in_features: int
    out_features: int
    max_rank: float = math.inf
    parts: tuple[str, ...] = ()


class WeightShard(NamedTuple):
    """A module's part of a layer on this worker: rows of `weight` from `row` on, `columns` (first, count) of A."""

    layer: str
    weight: torch.Tensor
    row: int
    part: Part
    columns: tuple[int, int]

    @property
    def live(self) -> torch.Tensor:
        """The weight that the engine computes with, as a view [rows, columns]."""
        return self.weight[self.row : self.row + self.part.rows]


class MergeTarget(NamedTuple):
    """A linear layer as PEFT knows it: one part of a fused layer, or all parts if PEFT's layer is fused too."""

    shards: list[WeightShard]
    shape: ModuleShape


def merge_targets(worker: Any) -> dict[str, MergeTarget]:
    """Return served name -> target, for every linear layer that computes with its weight as it lies in memory.

    A fused layer has a target for each of its modules, and one for all of them.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.utils import get_packed_modules_mapping

    model = worker.get_model()
    packed = get_packed_modules_mapping(model)  # last part of a fused layer's name -> those of its modules
    found = {}
    for name, layer in model.named_modules():
        if is_of_encoder(name):  # whose outputs vLLM keeps across pushes
            continue
        if not isinstance(layer, LinearBase) or type(layer.quant_method) is not UnquantizedLinearMethod:
            continue
        weight = layer.weight.data
        parts, columns = linear_parts(layer)
        if weight.shape != (sum(part.rows for part in parts), columns[1]):
            continue  # stored in a layout of its own
        parent, dot, own = name.rpartition(".")
        modules = assign_parts([parent + dot + each for each in packed.get(own, [own])], parts)
        rows = itertools.accumulate((part.rows for part in parts), initial=0)
        shards = [WeightShard(name, weight, row, part, columns) for row, part in zip(rows, parts, strict=False)]
        left = iter(shards)
        for module, shape in shapes_of(name, modules, int(layer.input_size)).items():
            own_shards = shards if shape.parts else list(itertools.islice(left, len(modules[module])))
            found[module] = MergeTarget(own_shards, shape)
    return found


def assign_parts(names: list[str], parts: list[Part]) -> dict[str, list[Part]]:
    """Map modules to their parts of a layer, in order: one each, all to a single one, or as `_PARTS` says.

    Empty if they do not match: then the layer cannot be adapted.
    """
    counts = [len(parts)] if len(names) == 1 else [_PARTS.get(name.rpartition(".")[2], 1) for name in names]
    if sum(counts) != len(parts):
        return {}
    ends = itertools.accumulate(counts)
    return {name: parts[end - count : end] for name, count, end in zip(names, counts, ends, strict=True)}


def shapes_of(
    layer: str, modules: dict[str, list[Part]], in_features: int, max_rank: float = math.inf
) -> dict[str, ModuleShape]:
    """Return the shapes of a layer's modules, and of all as one, under the layer's name, where they are several."""
    totals = {name: sum(part.total for part in parts) for name, parts in modules.items()}
    shapes = {name: ModuleShape(in_features, total, max_rank) for name, total in totals.items()}
    if len(modules) > 1 and layer not in modules:
        shapes[layer] = ModuleShape(in_features, sum(totals.values()), max_rank, tuple(modules))
    return shapes


def linear_parts(layer: Any) -> tuple[list[Part], tuple[int, int]]:
    """Return a layer's parts in the order of its weight's rows; this worker's first input feature, and how many."""
    from vllm.model_executor.layers import linear

    rank, shards = layer.tp_rank, layer.tp_size
    every_column = (0, layer.input_size)
    if isinstance(layer, linear.QKVParallelLinear):
        size, v_size = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        kv_rank = rank // layer.num_kv_head_replicas
        heads = [
            (layer.num_heads, rank, layer.total_num_heads, size),
            (layer.num_kv_heads, kv_rank, layer.total_num_kv_heads, size),
            (layer.num_kv_heads, kv_rank, layer.total_num_kv_heads, v_size),
        ]
        return [Part(own * each, own * each * index, total * each) for own, index, total, each in heads], every_column
    if isinstance(layer, linear.MergedColumnParallelLinear):
        return [Part(n // shards, n // shards * rank, n) for n in layer.output_sizes], every_column
    if isinstance(layer, linear.RowParallelLinear):
        own = layer.input_size_per_partition
        return [Part(layer.output_size, 0, layer.output_size)], (own * rank, own)
    if isinstance(layer, linear.ColumnParallelLinear):
        own = layer.output_size_per_partition
        return [Part(own, own * rank, layer.output_size)], every_column
    return [Part(layer.output_size, 0, layer.output_size)], every_column


def vllm_module_name(model: Any, peft_name: str) -> str:
    """Return the served model's own name for a module that PEFT calls `peft_name`."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        rename = getattr(mapper, "get_rename_mapper", None) or getattr(mapper, "get_unstacked_mapper", None)
        mapper = rename() if rename is not None else mapper
    name: str = parse_fine_tuned_lora_name(f"base_model.model.{peft_name}.lora_A.weight", mapper)[0]
    # An adapter trained on the language model alone (`shared.module_names`), which some mappers do not know.
    return f"language_model.{name}" if name.startswith("model.layers.") and hasattr(model, "language_model") else name
