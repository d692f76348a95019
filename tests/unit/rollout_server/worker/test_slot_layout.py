"""Where an adapter's tensors lie in the slots of tensor-parallel workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.lora.layers import column_parallel_linear as columns
from vllm.lora.layers import row_parallel_linear as rows
from vllm.model_executor.layers import linear

from rollout_server.vllm_compat import linears, lora_slots
from rollout_server.worker import slot_layout
from rollout_server.worker.slot_writer import SlotWriter, views_of
from shared.adapter_file import LORA_A, LORA_B, Layout, lay_out
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import UnsupportedAdapter

HIDDEN, HEADS, KV_HEADS, SIZE, INNER, RANK = 16, 4, 2, 8, 24, 3
Q, KV = HEADS * SIZE, KV_HEADS * SIZE


def _bare(kind: type, **attributes) -> nn.Module:
    """A layer of vLLM's without its constructor, which wants process groups."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _stacks(rows_of: list[int], inputs: int) -> dict:
    return {
        "lora_a_stacked": tuple(torch.zeros(1, 1, RANK, inputs) for _ in rows_of),
        "lora_b_stacked": tuple(torch.zeros(1, 1, n, RANK) for n in rows_of),
    }


def _worker(rank: int, shards: int) -> SimpleNamespace:
    """A worker whose fused layers take one adapter each, as Phi-3's do, and whose last layer is row-parallel."""
    tp = {"tp_rank": rank, "tp_size": shards}
    qkv = _bare(
        linear.QKVParallelLinear,
        head_size=SIZE,
        total_num_heads=HEADS,
        total_num_kv_heads=KV_HEADS,
        num_heads=HEADS // shards,
        num_kv_heads=max(1, KV_HEADS // shards),
        num_kv_head_replicas=max(1, shards // KV_HEADS),
        input_size=HIDDEN,
        **tp,
    )
    gate_up = _bare(linear.MergedColumnParallelLinear, output_sizes=[INNER, INNER], input_size=HIDDEN, **tp)
    down = _bare(
        linear.RowParallelLinear, input_size=INNER, output_size=HIDDEN, input_size_per_partition=INNER // shards, **tp
    )
    own_qkv = (qkv.num_heads + 2 * qkv.num_kv_heads) * SIZE
    modules = {
        "qkv_proj": _bare(
            columns.QKVParallelLinearWithLoRA,
            base_layer=qkv,
            q_proj_total_size=Q,
            kv_proj_total_size=KV,
            q_proj_shard_size=qkv.num_heads * SIZE,
            kv_proj_shard_size=qkv.num_kv_heads * SIZE,
            **tp,
            **_stacks([own_qkv], HIDDEN),
        ),
        "gate_up_proj": _bare(
            columns.ColumnParallelLinearWithLoRA,
            base_layer=gate_up,
            is_merged_col_linear=True,
            output_size=2 * INNER // shards,
            **tp,
            **_stacks([2 * INNER // shards], HIDDEN),
        ),
        "down_proj": _bare(
            rows.RowParallelLinearWithLoRA,
            base_layer=down,
            input_size=INNER // shards,
            **tp,
            **_stacks([HIDDEN], INNER // shards),
        ),
    }
    manager = SimpleNamespace(modules=modules, packed_modules={}, model=nn.Module())
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    return SimpleNamespace(model_runner=runner, get_model=lambda: manager.model, modules=modules)


def _adapter() -> dict[str, torch.Tensor]:
    shapes = {"qkv_proj": (Q + 2 * KV, HIDDEN), "gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        tensors[name + LORA_A] = torch.randn(RANK, in_features)
        tensors[name + LORA_B] = torch.randn(out_features, RANK)
    return tensors


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_one_adapter_over_a_fused_layer_is_cut_without_a_copy(shards: int) -> None:
    """What arrives later in the same buffer is what the next push writes."""
    tensors = _adapter()
    for rank in range(shards):
        worker = _worker(rank, shards)
        plan = slot_layout.plan_copies(worker, 0, tensors)
        for name, tensor in _adapter().items():
            tensors[name].copy_(tensor)
        for copies in plan.groups:
            copies.write()
        own = {name: module.lora_b_stacked[0][0, 0] for name, module in worker.modules.items()}
        q, k, v = tensors["qkv_proj" + LORA_B].split([Q, KV, KV])
        gate, up = tensors["gate_up_proj" + LORA_B].chunk(2)
        kv_shards = min(shards, KV_HEADS)
        kv_rank = rank // (shards // kv_shards)
        expected = [q.chunk(shards)[rank], k.chunk(kv_shards)[kv_rank], v.chunk(kv_shards)[kv_rank]]
        assert torch.equal(own["qkv_proj"], torch.cat(expected))
        assert torch.equal(own["gate_up_proj"], torch.cat([gate.chunk(shards)[rank], up.chunk(shards)[rank]]))
        assert torch.equal(own["down_proj"], tensors["down_proj" + LORA_B])
        a = worker.modules["down_proj"].lora_a_stacked[0][0, 0]
        assert torch.equal(a, tensors["down_proj" + LORA_A].chunk(shards, 1)[rank])


def test_a_shard_that_is_a_copy_is_refused() -> None:
    worker = _worker(0, 2)
    module = worker.modules["down_proj"]
    module.slice_lora_a = lambda a: a[:, : INNER // 2].clone()
    with pytest.raises(ValueError, match="copy"):
        slot_layout.plan_copies(worker, 0, _adapter())


def test_one_narrow_tensor_does_not_hold_up_the_others() -> None:
    rank, slot_rank = 4, 16
    stack_a, stack_b = torch.zeros(2, 1, slot_rank, 32), torch.zeros(2, 1, 48, slot_rank)
    a_RI, b_OR, full_b_OR = torch.randn(rank, 32), torch.randn(48, rank), torch.randn(48, slot_rank)
    pairs = [
        (a_RI, stack_a[1, 0, :rank]),
        (b_OR, stack_b[1, 0, :, :rank]),
        (full_b_OR, stack_b[0, 0]),
        (a_RI[:, :16], stack_a[0, 0, :rank, :16]),
    ]
    fast, slow = slot_layout.group_copies(pairs)
    assert [t.shape for t in fast.received] == [a_RI.shape, full_b_OR.shape]
    assert [t.shape for t in slow.received] == [b_OR.shape, (rank, 16)]
    for copies in (fast, slow):
        copies.write()
    assert torch.equal(stack_a[1, 0, :rank], a_RI)
    assert torch.equal(stack_b[1, 0, :, :rank], b_OR)
    assert torch.equal(stack_b[0, 0], full_b_OR)
    assert not stack_b[1, 0, :, rank:].any()


def test_there_is_no_empty_group() -> None:
    (only,) = slot_layout.group_copies([(torch.ones(2, 2), torch.zeros(2, 2))])
    assert len(only.slot) == 1


KEY, VALUE = 8, 24


def _gated_delta(rank: int, shards: int, slices: list[int]) -> SimpleNamespace:
    """A worker with a gated delta net's fused layer, whose slots have `slices`."""
    tp = {"tp_rank": rank, "tp_size": shards}
    base = _bare(linear.MergedColumnParallelLinear, output_sizes=[KEY, KEY, VALUE, VALUE], input_size=HIDDEN, **tp)
    layer = _bare(
        columns.MergedColumnParallelLinearWithLoRA,
        base_layer=base,
        lora_config=SimpleNamespace(fully_sharded_loras=False),
        n_slices=4,
        **tp,
        **_stacks(slices, HIDDEN),
    )
    modules = {"linear_attn.in_proj_qkvz": layer}
    packed = {"linear_attn.in_proj_qkvz": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"]}
    manager = SimpleNamespace(modules=modules, packed_modules=packed, model=nn.Module())
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    return SimpleNamespace(model_runner=runner, get_model=lambda: manager.model, layer=layer)


def _flat(names: list[str]) -> tuple[torch.Tensor, Layout]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        out_features = VALUE if name.endswith("_z") else 2 * KEY + VALUE
        shapes |= {name + LORA_A: (RANK, HIDDEN), name + LORA_B: (out_features, RANK)}
    layout = Layout(lay_out(shapes, "float32"))
    return torch.randn(layout.nbytes // 4), layout


@pytest.mark.parametrize("names", [["in_proj_qkv", "in_proj_z"], ["in_proj_z"], ["in_proj_qkv"]])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_module_that_is_several_slices_of_a_layer_has_its_a_in_each(names: list[str], shards: int) -> None:
    names = [f"linear_attn.{name}" for name in names]
    flat, layout = _flat(names)
    for rank in range(shards):
        worker = _gated_delta(rank, shards, [n // shards for n in (KEY, KEY, VALUE, VALUE)])
        worker.device = torch.device("cpu")
        worker.model_runner.lora_manager._adapter_manager.lora_index_to_id = [1]
        writer = SlotWriter(worker)
        writer.check(layout)
        writer.buffer(layout).copy_(flat.view(torch.uint8))
        sums = torch.cat(list(block_sums(flat.view(torch.int32), torch.from_numpy(block_weights()))))
        announced = checksum(layout.index, sums.numpy().tobytes())
        writer.write(1, layout, announced)
        tensors = views_of(flat, layout)
        expected: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * 4
        for name, (a, b) in slot_layout.lora_pairs(tensors).items():
            first, sizes = (3, [VALUE]) if name.endswith("_z") else (0, [KEY, KEY, VALUE])
            for index, rows_of in enumerate(b.split(sizes), first):
                expected[index] = (a, rows_of.chunk(shards)[rank])
        for index, pair in enumerate(expected):
            own_a, own_b = worker.layer.lora_a_stacked[index][0, 0], worker.layer.lora_b_stacked[index][0, 0]
            a, b = pair or (torch.zeros_like(own_a), torch.zeros_like(own_b))
            assert torch.equal(own_a, a)
            assert torch.equal(own_b, b)


def _two_slices(rank: int, shards: int) -> SimpleNamespace:
    """A worker whose `gate_up_proj` takes an adapter for each half, as vLLM's mapping of GLM-4 says."""
    worker = _worker(rank, shards)
    base = worker.modules["gate_up_proj"].base_layer
    worker.modules["gate_up_proj"] = _bare(
        columns.MergedColumnParallelLinearWithLoRA,
        base_layer=base,
        lora_config=SimpleNamespace(fully_sharded_loras=False),
        n_slices=2,
        tp_rank=rank,
        tp_size=shards,
        **_stacks([INNER // shards, INNER // shards], HIDDEN),
    )
    del worker.modules["qkv_proj"], worker.modules["down_proj"]
    manager = worker.model_runner.lora_manager._adapter_manager
    manager.packed_modules, manager.lora_index_to_id = {"gate_up_proj": ["gate_proj", "up_proj"]}, [1]
    worker.device = torch.device("cpu")
    return worker


def _sent(writer: SlotWriter, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    layout = Layout(lay_out(shapes, "float32"))
    flat = torch.randn(layout.nbytes // 4)
    writer.check(layout)
    writer.buffer(layout).copy_(flat.view(torch.uint8))
    sums = torch.cat(list(block_sums(flat.view(torch.int32), torch.from_numpy(block_weights()))))
    writer.write(1, layout, checksum(layout.index, sums.numpy().tobytes()))
    return views_of(flat, layout)


def _shapes(name: str, out_features: int) -> dict[str, tuple[int, ...]]:
    return {name + LORA_A: (RANK, HIDDEN), name + LORA_B: (out_features, RANK)}


@pytest.mark.parametrize("shards", [1, 2])
def test_an_adapter_may_have_a_fused_layer_as_one(shards: int) -> None:
    """GLM-4's is one in transformers, though vLLM's slots are of its halves."""
    for rank in range(shards):
        worker = _two_slices(rank, shards)
        layer = worker.modules["gate_up_proj"]
        writer = SlotWriter(worker)
        assert writer.describe()["modules"] == 2
        tensors = _sent(writer, _shapes("gate_up_proj", 2 * INNER))
        for index, half in enumerate(tensors["gate_up_proj" + LORA_B].chunk(2)):
            assert torch.equal(layer.lora_a_stacked[index][0, 0], tensors["gate_up_proj" + LORA_A])
            assert torch.equal(layer.lora_b_stacked[index][0, 0], half.chunk(shards)[rank])
        tensors = _sent(writer, _shapes("up_proj", INNER))  # as ever
        assert not layer.lora_b_stacked[0].any()
        assert torch.equal(layer.lora_b_stacked[1][0, 0], tensors["up_proj" + LORA_B].chunk(shards)[rank])


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_a_fused_layer_and_a_part_of_it_are_refused_together(part: str) -> None:
    both = _shapes("gate_up_proj", 2 * INNER) | _shapes(part, INNER)
    for shapes in (both, dict(reversed(both.items()))):
        with pytest.raises(UnsupportedAdapter, match=rf"^{part} and gate_up_proj are one layer .* send one of them"):
            SlotWriter(_two_slices(0, 1)).check(Layout(lay_out(shapes, "float32")))


def test_a_layer_that_is_not_served_is_refused_with_the_kinds_that_are() -> None:
    with pytest.raises(UnsupportedAdapter, match=r"layer 'mlp.dense'; .*target_modules.*: gate_proj, gate_up_proj, up"):
        SlotWriter(_two_slices(0, 1)).check(Layout(lay_out(_shapes("mlp.dense", INNER), "float32")))


def test_a_part_that_differs_between_slices_is_noticed() -> None:
    flat, layout = _flat(["linear_attn.in_proj_qkv"])
    worker = _gated_delta(0, 1, [KEY, KEY, VALUE, VALUE])
    plan = slot_layout.plan_copies(worker, 0, views_of(flat, layout))
    assert len(plan.repeated) == 2


@pytest.mark.parametrize("slices", [[KEY, VALUE, VALUE, VALUE], [2 * KEY + 2 * VALUE, 0], [KEY]])
def test_slots_that_are_cut_in_another_way_are_refused_before_anything_is_written(slices: list[int]) -> None:
    worker = _gated_delta(0, 1, slices)
    worker.device = torch.device("cpu")
    with pytest.raises(UnsupportedAdapter, match=r"linear_attn\.in_proj_qkv"):
        SlotWriter(worker).check(_flat(["linear_attn.in_proj_qkv"])[1])


def test_value_heads_may_have_a_size_of_their_own() -> None:
    lora_slots.install()
    base = _bare(
        linear.QKVParallelLinear,
        head_size=SIZE,
        v_head_size=2 * SIZE,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        total_num_heads=HEADS,
        total_num_kv_heads=KV_HEADS,
        num_kv_head_replicas=1,
        output_sizes=[Q, KV, 2 * KV],
        output_size_per_partition=Q + 3 * KV,
        input_size=HIDDEN,
        tp_rank=0,
        tp_size=1,
        weight=nn.Parameter(torch.zeros(Q + 3 * KV, HIDDEN)),
    )
    layer = columns.MergedQKVParallelLinearWithLoRA(base)
    config = SimpleNamespace(max_lora_rank=RANK, fully_sharded_loras=False, lora_dtype=torch.float32)
    layer.create_lora_weights(1, config)
    assert [stack.shape[2] for stack in layer.lora_b_stacked] == [Q, KV, 2 * KV]
    names = ["q_proj", "k_proj", "v_proj"]
    assert list(lora_slots.LoraLayer(layer, names, "qkv_proj").shapes()) == [*names, "qkv_proj"]


def test_two_names_for_one_layer_are_refused_by_both() -> None:
    names = ["model.layers.0.q_proj", "language_model.model.layers.0.q_proj"]
    shapes = {name + end: shape for name in names for end, shape in ((LORA_A, (2, 4)), (LORA_B, (4, 2)))}
    served = {names[1]: linears.ModuleShape(4, 4)}
    model = SimpleNamespace(language_model=None)
    slot_layout.check_fits(model, served, Layout(lay_out(dict(list(shapes.items())[:2]), "float32")))
    with pytest.raises(UnsupportedAdapter, match=f"^{names[0]} and {names[1]} are one layer"):
        slot_layout.check_fits(model, served, Layout(lay_out(shapes, "float32")))
