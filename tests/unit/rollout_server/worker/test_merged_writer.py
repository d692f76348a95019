"""W0 + B @ A in the live weights: fused parts, tensor-parallel shards, and the way back to W0."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from vllm.model_executor.layers import linear

from rollout_server.vllm_compat import linears
from rollout_server.worker import merged_writer
from rollout_server.worker.merged_writer import MergedWriter
from shared.adapter_file import LORA_A, LORA_B, Layout, lay_out
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import ErrorCode, LockstepError

HIDDEN, HEADS, KV_HEADS, SIZE, INNER, RANK = 16, 4, 2, 8, 24, 3
SHAPES = {
    "q_proj": (HEADS * SIZE, HIDDEN),
    "k_proj": (KV_HEADS * SIZE, HIDDEN),
    "v_proj": (KV_HEADS * SIZE, HIDDEN),
    "o_proj": (HIDDEN, HEADS * SIZE),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


def _layer(kind: type, weight: torch.Tensor, **attributes) -> nn.Module:
    """A layer of vLLM's without its constructor, which wants process groups."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.quant_method = linear.UnquantizedLinearMethod.__new__(linear.UnquantizedLinearMethod)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _worker(full: dict[str, torch.Tensor], rank: int = 0, shards: int = 1) -> SimpleNamespace:
    """A worker that holds its shard of a one-layer model."""
    tp = {"tp_rank": rank, "tp_size": shards}
    replicas = max(1, shards // KV_HEADS)

    def rows(name: str, index: int, parts: int) -> torch.Tensor:
        return full[name].chunk(parts)[index]

    kv = (rank // replicas, shards // replicas)
    attention, mlp = nn.Module(), nn.Module()
    attention.qkv_proj = _layer(
        linear.QKVParallelLinear,
        torch.cat([rows("q_proj", rank, shards), rows("k_proj", *kv), rows("v_proj", *kv)]),
        input_size=HIDDEN,
        head_size=SIZE,
        total_num_heads=HEADS,
        total_num_kv_heads=KV_HEADS,
        num_heads=HEADS // shards,
        num_kv_heads=max(1, KV_HEADS // shards),
        num_kv_head_replicas=replicas,
        **tp,
    )
    attention.o_proj = _layer(
        linear.RowParallelLinear,
        full["o_proj"].chunk(shards, 1)[rank].clone(),
        input_size=HEADS * SIZE,
        output_size=HIDDEN,
        input_size_per_partition=HEADS * SIZE // shards,
        **tp,
    )
    mlp.gate_up_proj = _layer(
        linear.MergedColumnParallelLinear,
        torch.cat([rows("gate_proj", rank, shards), rows("up_proj", rank, shards)]),
        input_size=HIDDEN,
        output_sizes=[INNER, INNER],
        **tp,
    )
    mlp.down_proj = _layer(
        linear.RowParallelLinear,
        full["down_proj"].chunk(shards, 1)[rank].clone(),
        input_size=INNER,
        output_size=HIDDEN,
        input_size_per_partition=INNER // shards,
        **tp,
    )
    model = nn.Module()
    model.self_attn, model.mlp = attention, mlp
    model.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return SimpleNamespace(get_model=lambda: model, device=torch.device("cpu"), model=model)


def _parent(name: str) -> str:
    return "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def _weights(worker: SimpleNamespace) -> dict[str, torch.Tensor]:
    shards = [shard for target in linears.merge_targets(worker).values() for shard in target.shards]
    return {shard.layer: shard.weight for shard in shards}


def _live(worker: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in _weights(worker).items()}


def _base(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def _adapter(names, dtype: torch.dtype, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    tensors = {}
    for name in names:
        rows, columns = SHAPES[name]
        tensors[f"{_parent(name)}.{name}{LORA_A}"] = (torch.randn(RANK, columns) * scale).to(dtype)
        tensors[f"{_parent(name)}.{name}{LORA_B}"] = (torch.randn(rows, RANK) * scale).to(dtype)
    return tensors


def _send(writer: MergedWriter, tensors: dict[str, torch.Tensor]) -> str:
    """What `fill` does on a worker; the checksum."""
    dtype = next(iter(tensors.values())).dtype
    name = str(dtype).removeprefix("torch.")
    entries = lay_out({key: tuple(tensor.shape) for key, tensor in tensors.items()}, name)
    layout = Layout(entries)
    writer.check(layout)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    writer.buffer(layout).copy_(flat.view(torch.uint8))
    integers = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    sums = torch.cat(list(block_sums(integers, torch.from_numpy(block_weights()))))
    announced = checksum(layout.index, np.asarray(sums).tobytes())
    assert writer.write(0, layout, announced) == len(tensors) // 2
    return announced


def _merged(full: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    merged = dict(full)
    for key, a in tensors.items():
        if key.endswith(LORA_A):
            name, b = key.removesuffix(LORA_A).split(".")[-1], tensors[key.removesuffix(LORA_A) + LORA_B]
            merged[name] = (full[name].double() + b.double() @ a.double()).to(full[name].dtype)
    return merged


def _assert_close(worker: SimpleNamespace, expected: SimpleNamespace) -> None:
    for name, weight in _live(worker).items():
        # Sums in another order may fall on the other side of a rounding boundary: one unit in the last place.
        torch.testing.assert_close(weight, _live(expected)[name], rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "shards"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_every_part_and_shard(dtype: torch.dtype, rank: int, shards: int, monkeypatch) -> None:
    monkeypatch.setattr(merged_writer, "_CHUNK", 5 * HIDDEN)
    full = _base(dtype)
    worker = _worker(full, rank, shards)
    writer = MergedWriter(worker)
    assert writer.describe() == {"modules": 7, "linear": 4}
    tensors = _adapter(SHAPES, dtype, seed=1)
    before = _live(worker)
    announced = _send(writer, tensors)
    assert all(torch.equal(weight, before[name]) for name, weight in _live(worker).items()), "received, not applied"
    assert writer.apply(announced) == 7
    _assert_close(worker, _worker(_merged(full, tensors), rank, shards))
    assert writer.apply(None) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in _live(worker).items())


@pytest.mark.parametrize(("rank", "shards"), [(0, 1), (1, 2)])
def test_a_fused_layer_may_be_one_module(rank: int, shards: int) -> None:
    """GLM-4's `gate_up_proj` is one layer in transformers, though vLLM's mapping says two."""
    full = _base(torch.float32)
    worker = _worker(full, rank, shards)
    writer = MergedWriter(worker)
    halves = _adapter(["gate_proj", "up_proj"], torch.float32, seed=1)
    a = halves["mlp.gate_proj" + LORA_A]
    halves["mlp.up_proj" + LORA_A] = a
    both = torch.cat([halves[f"mlp.{name}{LORA_B}"] for name in ("gate_proj", "up_proj")])
    assert writer.apply(_send(writer, {"mlp.gate_up_proj" + LORA_A: a, "mlp.gate_up_proj" + LORA_B: both})) == 2
    expected = _worker(_merged(full, halves), rank, shards)
    _assert_close(worker, expected)
    assert writer.apply(_send(writer, halves)) == 2
    _assert_close(worker, expected)
    with pytest.raises(LockstepError, match="are one layer"):
        _send(writer, {"mlp.gate_up_proj" + LORA_A: a, "mlp.gate_up_proj" + LORA_B: both, **halves})


def test_a_small_update_arrives_with_the_same_bits_everywhere() -> None:
    """An update of a thousandth of the weights, of which rounding to nearest loses most."""
    full, tensors = _base(torch.bfloat16), _adapter(SHAPES, torch.bfloat16, seed=1, scale=0.02)
    workers = [_worker(full), _worker(full)]
    writers = [MergedWriter(worker) for worker in workers]
    for writer in writers:
        writer.apply(_send(writer, tensors))
    first, second = map(_live, workers)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert 0.8 < writers[0].arrived.share < 1.2
    assert writers[0].arrived.error > 0.5
    exact = _live(_worker(_merged({name: weight.float() for name, weight in full.items()}, tensors)))
    before, nearest = _live(_worker(full)), _live(_worker(_merged(full, tensors)))
    assert 0.8 < _share(first, before, exact) < 1.2
    assert _share(nearest, before, exact) < 0.5
    writers[0].apply(None)
    assert writers[0].arrived.share is None


def _share(live: dict[str, torch.Tensor], before: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The regression of what moved on what should have."""
    meant = torch.cat([(exact[name] - weight.float()).flatten() for name, weight in before.items()])
    made = torch.cat([(live[name].float() - weight.float()).flatten() for name, weight in before.items()])
    return ((made * meant).sum() / meant.square().sum()).item()


def test_no_drift_and_modules_left_out_are_w0_again() -> None:
    full = _base(torch.bfloat16)
    worker = _worker(full)
    writer = MergedWriter(worker)
    addresses = {name: weight.data_ptr() for name, weight in _weights(worker).items()}
    for seed, names in enumerate([SHAPES, ["q_proj"], ["v_proj", "up_proj"], ["o_proj"], ["v_proj"]]):
        tensors = _adapter(names, torch.bfloat16, seed)
        writer.apply(_send(writer, tensors))
        _assert_close(worker, _worker(_merged(full, tensors)))
    k_rows = _live(worker)["self_attn.qkv_proj"][HEADS * SIZE : HEADS * SIZE + KV_HEADS * SIZE]
    assert torch.equal(k_rows, full["k_proj"])
    writer.apply(None)
    assert all(torch.equal(weight, _live(_worker(full))[name]) for name, weight in _live(worker).items())
    assert addresses == {name: weight.data_ptr() for name, weight in _weights(worker).items()}


def test_the_adapter_before_can_be_applied_again() -> None:
    worker = _worker(_base(torch.float32))
    writer = MergedWriter(worker)
    first = _send(writer, _adapter(SHAPES, torch.float32, 1))
    writer.apply(first)
    wanted = _live(worker)
    second = _send(writer, _adapter(["q_proj"], torch.float32, 2))
    writer.apply(second)
    writer.apply(first)
    assert all(torch.equal(weight, wanted[name]) for name, weight in _live(worker).items())
    with pytest.raises(LockstepError, match="was received"):
        writer.apply("unknown")


def test_overflow_is_refused_and_undone() -> None:
    full = _base(torch.float16)
    worker = _worker(full)
    writer = MergedWriter(worker)
    loud = _send(writer, _adapter(["q_proj"], torch.float16, 1, scale=300.0))
    with pytest.raises(LockstepError) as refusal:
        writer.apply(loud)
    assert refusal.value.code is ErrorCode.NOT_FINITE
    writer.apply(None)
    assert all(torch.equal(weight, _live(_worker(full))[name]) for name, weight in _live(worker).items())


def test_what_does_not_fit_is_refused() -> None:
    writer = MergedWriter(_worker(_base(torch.float32)))
    for name, shape, code in (
        ("self_attn.qk_proj", (HEADS * SIZE, HIDDEN), ErrorCode.UNSUPPORTED_ADAPTER),
        ("self_attn.k_proj", (HEADS * SIZE, HIDDEN), ErrorCode.SHAPE_MISMATCH),
    ):
        entries = lay_out({name + LORA_A: (RANK, shape[1]), name + LORA_B: (shape[0], RANK)}, "float32")
        with pytest.raises(LockstepError) as refusal:
            writer.check(Layout(entries))
        assert refusal.value.code is code
