"""`--apply columns`: LoRA layers of vLLM's own, in bfloat16, whose base and adapters are one product."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear as linear_function
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.layers import column_parallel_linear as column_parallel
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.replicated_linear import ReplicatedLinearWithLoRA
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers import linear

from rollout_server import vllm_compat
from rollout_server.vllm_compat import lora_columns, one_product
from rollout_server.vllm_compat.lora_slots import LoraLayer

IN, OUT, HEADS, KV_HEADS, SIZE, RANK, SLOTS = 96, 128, 4, 2, 16, 4, 3
QKV = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
#: Slots of the tokens of a batch: two versions of a policy, and the base.
MIXED = [0] * 16 + [-1] * 16 + [1] * 16 + [-1, 0, 1] * 16


@pytest.fixture(autouse=True)
def _in_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Patched for good otherwise.
    monkeypatch.setattr(linear.UnquantizedLinearMethod, "create_weights", linear.UnquantizedLinearMethod.create_weights)
    monkeypatch.setattr(LoRAModelManager, "_create_lora_modules", LoRAModelManager._create_lora_modules)
    lora_columns.install()
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    config = VllmConfig()
    config.lora_config = _lora()
    with set_current_vllm_config(config), torch.inference_mode():
        torch.manual_seed(0)
        yield


def _lora(**options) -> LoRAConfig:
    config = LoRAConfig(max_loras=SLOTS, max_lora_rank=8, **options)
    config.lora_dtype = torch.bfloat16
    return config


def _punica() -> PunicaWrapperCPU:
    return PunicaWrapperCPU(256, 256, torch.device("cpu"))


def _qkv() -> linear.LinearBase:
    return linear.QKVParallelLinear(IN, SIZE, HEADS, KV_HEADS, disable_tp=True, params_dtype=torch.bfloat16)


def _gate_up() -> linear.LinearBase:
    return linear.MergedColumnParallelLinear(IN, [OUT, OUT], False, disable_tp=True, params_dtype=torch.bfloat16)


def _one(kind: type, inputs: int = IN, outputs: int = OUT) -> linear.LinearBase:
    return kind(inputs, outputs, bias=True, disable_tp=True, params_dtype=torch.bfloat16)


#: Name -> base, vLLM's LoRA layer on it, and widths of PEFT's modules.
LAYERS: dict[str, tuple[Callable[[], linear.LinearBase], type, list[int]]] = {
    "q, k, v": (_qkv, column_parallel.MergedQKVParallelLinearWithLoRA, QKV),
    "qkv of one module": (_qkv, column_parallel.QKVParallelLinearWithLoRA, [sum(QKV)]),
    "gate, up": (_gate_up, column_parallel.MergedColumnParallelLinearWithLoRA, [OUT, OUT]),
    "gate_up of one module": (_gate_up, column_parallel.ColumnParallelLinearWithLoRA, [2 * OUT]),
    "column": (lambda: _one(linear.ColumnParallelLinear), column_parallel.ColumnParallelLinearWithLoRA, [OUT]),
    "row": (lambda: _one(linear.RowParallelLinear), RowParallelLinearWithLoRA, [OUT]),
    "replicated": (lambda: _one(linear.ReplicatedLinear), ReplicatedLinearWithLoRA, [OUT]),
}


def _module(base: linear.LinearBase, kind: type) -> BaseLinearLayerWithLoRA:
    """A LoRA layer as vLLM's manager leaves it, its slots empty."""
    base.weight.data.normal_(std=IN**-0.5)
    base.cpu_linear = linear_function
    if base.bias is not None:
        base.bias.data = torch.randn(base.bias.shape).bfloat16()
    module = kind(base)
    module.create_lora_weights(SLOTS, _lora())
    module.set_mapping(_punica())
    return module


def _in_columns_of(name: str) -> tuple[BaseLinearLayerWithLoRA, list[int]]:
    make, kind, widths = LAYERS[name]
    module = _module(make(), kind)
    LoRAModelManager._create_lora_modules(_manager_of(module))
    assert lora_columns.computes_in_columns(module)
    return module, widths


def _manager_of(module: BaseLinearLayerWithLoRA) -> SimpleNamespace:
    """A manager that has wrapped its layers: what is left to do is ours."""
    no_model = SimpleNamespace(named_modules=lambda **_: ())
    return SimpleNamespace(model=no_model, modules={"layer": module}, lora_config=_lora())


def _adapter(widths: list[int], scale: float, inputs: int = IN) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module."""
    a = [torch.randn(RANK, inputs).bfloat16() / inputs**0.5 for _ in widths]
    return [(each, (torch.randn(width, RANK) * scale).bfloat16()) for each, width in zip(a, widths, strict=True)]


def _install(module: BaseLinearLayerWithLoRA, slot: int, adapter: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    layer = LoraLayer(module, [str(i) for i in range(len(adapter))], "fused")
    layer.clear(slot)
    for received, place in layer.slot_pairs(slot, adapter):
        place.copy_(received)


def _compute(module: BaseLinearLayerWithLoRA, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    ids = [f"adapter {slot}" for slot in range(SLOTS)]
    numbers = [slot + 1 if slot >= 0 else 0 for slot in slots]
    mapping = LoRAMapping(tuple(numbers), tuple(numbers), is_prefill=True)
    module.punica_wrapper.update_metadata(mapping, list(range(1, len(ids) + 1)), SLOTS, 100)
    return module.apply(x, module.base_layer.bias)


def _moved(x: torch.Tensor, adapter: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The adapter's true share of the output, h rounded."""
    return torch.cat([linear_function(linear_function(x, a).float(), b.float()) for a, b in adapter], -1)


def _expected(module: BaseLinearLayerWithLoRA, x: torch.Tensor, slots: list[int], adapters: list) -> torch.Tensor:
    """The output [tokens, out] in float32."""
    bias = module.base_layer.bias
    y = linear_function(x.float(), module.base_layer.weight.float(), None if bias is None else bias.float())
    for slot, adapter in enumerate(adapters):
        own = torch.tensor(slots) == slot
        y[own] += _moved(x[own], adapter)
    return y


def _is_rounded_once(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Sums in another order fall on the other side of a few halves."""
    rounded = expected.bfloat16()
    closest = (y.float() - expected).abs() <= 1.01 * (rounded.float() - expected).abs() + 1e-6
    return closest.double().mean().item() > 0.98 and torch.allclose(y.float(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_two_versions_and_the_base_is_rounded_once(name: str) -> None:
    module, widths = _in_columns_of(name)
    adapters = [_adapter(widths, scale=1.0), _adapter(widths, scale=1.0)]
    for slot, adapter in enumerate(adapters):
        _install(module, slot, adapter)
    x = torch.randn(len(MIXED), IN).bfloat16()
    assert _is_rounded_once(_compute(module, x, MIXED), _expected(module, x, MIXED, adapters))


@pytest.mark.parametrize("name", LAYERS)
def test_a_movement_below_half_a_unit_arrives(name: str) -> None:
    """The share of the adapter's movement in the outputs'; vLLM's own kernels, on the same layer, lose it."""
    module, widths = _in_columns_of(name)
    make, kind, _ = LAYERS[name]
    of_vllm = _module(make(), kind)
    x, adapter = torch.randn(256, IN).bfloat16(), _adapter(widths, scale=2.0**-11)
    true = _moved(x, adapter)
    shares = []
    for each in (module, of_vllm):
        base = _compute(each, x, [0] * len(x)).float()
        _install(each, 0, adapter)
        moved = _compute(each, x, [0] * len(x)).float() - base
        shares.append(((moved * true).sum() / (true * true).sum()).item())
    assert 0.9 < shares[0] < 1.1
    assert shares[1] < 0.7


@pytest.mark.parametrize("name", LAYERS)
def test_another_slot_being_filled_changes_no_bit(name: str) -> None:
    module, widths = _in_columns_of(name)
    for slot in range(2):
        _install(module, slot, _adapter(widths, scale=1.0))
    x = torch.randn(len(MIXED), IN).bfloat16()
    before = _compute(module, x, MIXED)
    huge = torch.finfo(torch.bfloat16).max
    _install(module, 2, [(torch.full_like(a, huge), torch.full_like(b, huge)) for a, b in _adapter(widths, 1.0)])
    assert torch.equal(_compute(module, x, MIXED), before)


@pytest.mark.parametrize("name", LAYERS)
def test_the_base_stays_to_the_bit(name: str) -> None:
    module, widths = _in_columns_of(name)
    base = module.base_layer
    weight, x = base.weight.data.clone(), torch.randn(64, IN).bfloat16()
    alone = linear_function(x, weight, base.bias)
    for slot in range(SLOTS):
        _install(module, slot, _adapter(widths, scale=1.0))
    assert torch.equal(base.weight.data, weight)
    assert torch.equal(_compute(module, x, [-1] * 64), alone)


def test_swapped_slots_serve_each_other() -> None:
    module, widths = _in_columns_of("q, k, v")
    first, second = _adapter(widths, scale=1.0), _adapter(widths, scale=1.0)
    x = torch.randn(32, IN).bfloat16()
    _install(module, 0, first)
    _install(module, 1, second)
    of_second = _compute(module, x, [1] * 32)
    _install(module, 0, second)
    assert torch.equal(_compute(module, x, [0] * 32), of_second)


def test_a_lower_rank_leaves_nothing_of_a_higher_one() -> None:
    module, widths = _in_columns_of("gate, up")
    x, adapter = torch.randn(32, IN).bfloat16(), _adapter(widths, scale=1.0)
    _install(module, 0, adapter)
    alone = _compute(module, x, [0] * 32)
    _install(module, 0, [(torch.randn(8, IN).bfloat16(), torch.randn(OUT, 8).bfloat16()) for _ in widths])
    _install(module, 0, adapter)
    assert torch.equal(_compute(module, x, [0] * 32), alone)


def test_what_is_in_a_slot_can_be_read_back() -> None:
    module, widths = _in_columns_of("q, k, v")
    adapter = _adapter(widths, scale=1.0)
    _install(module, 1, adapter)
    layer = LoraLayer(module, ["q", "k", "v"], "qkv")
    places = layer.slot_pairs(1, [(torch.empty_like(a), torch.empty_like(b)) for a, b in adapter])
    read_back = [place for _, place in places]
    sent = [a for a, _ in adapter] + [b for _, b in adapter]
    assert all(torch.equal(one, other) for one, other in zip(read_back, sent, strict=True))


@pytest.mark.parametrize("name", ["column", "row"])
def test_tensor_parallel_shards_make_the_whole(name: str) -> None:
    """Each of two workers computes with its shard; a row-parallel layer's outputs are added up."""
    make, kind, _ = LAYERS[name]
    whole, adapter = _module(make(), kind), _adapter([OUT], scale=1.0)
    x, parts = torch.randn(32, IN).bfloat16(), []
    for rank in range(2):
        rows = slice(rank * OUT // 2, (rank + 1) * OUT // 2) if name == "column" else slice(0, OUT)
        columns = slice(rank * IN // 2, (rank + 1) * IN // 2) if name == "row" else slice(0, IN)
        own = whole.base_layer.weight[rows, columns]
        shard = _module(_one(type(whole.base_layer), own.shape[1], own.shape[0]), kind)
        shard.base_layer.weight.data.copy_(own)
        for each in (shard, shard.base_layer):
            each.tp_rank, each.tp_size = rank, 2
        shard.base_layer.input_size, shard.base_layer.output_size = IN, OUT
        lora_columns.use_columns(shard)
        _install(shard, 0, adapter)
        shard.base_layer.bias = None
        parts.append(_compute(shard, x[:, columns].contiguous(), [0] * 32).float())
    whole.base_layer.bias = None
    expected = _expected(whole, x, [0] * 32, [adapter])
    joined = torch.cat(parts, -1) if name == "column" else sum(parts)
    assert torch.allclose(joined, expected, rtol=2**-6, atol=0.05)


def test_the_transformers_backend_has_one_more_dimension() -> None:
    module, widths = _in_columns_of("column")
    _install(module, 0, _adapter(widths, scale=1.0))
    x = torch.randn(32, IN).bfloat16()
    flat = _compute(module, x, [0] * 32)
    assert torch.equal(_compute(module, x[None], [0] * 32), flat[None])


def test_one_compiled_graph_serves_every_batch() -> None:
    """No part of the mapping of tokens to slots, and not the number of tokens, is traced into a graph."""
    module, widths = _in_columns_of("q, k, v")
    for slot in range(2):
        _install(module, slot, _adapter(widths, scale=1.0))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: module.apply(x, module.base_layer.bias), fullgraph=True, dynamic=True, backend=backend
    )
    for slots in ([0] * 40, MIXED, [-1] * 24, [1, -1, 0]):
        x = torch.randn(len(slots), IN).bfloat16()
        assert torch.equal(_compute(module, x, slots), compiled(x))
    assert len(graphs) == 1


def _quantized(module: BaseLinearLayerWithLoRA) -> None:
    module.base_layer.quant_method = object()


def _moved_away(module: BaseLinearLayerWithLoRA) -> None:
    module.base_layer.weight.data = module.base_layer.weight.data.clone()


def _of_another_dtype(module: BaseLinearLayerWithLoRA) -> None:
    module.lora_a_stacked = tuple(stack.half() for stack in module.lora_a_stacked)


def _with_a_forward_of_its_own(module: BaseLinearLayerWithLoRA) -> None:
    module.base_layer.__class__ = type("GateLinear", (linear.ReplicatedLinear,), {})


@pytest.mark.parametrize("alter", [_quantized, _moved_away, _of_another_dtype, _with_a_forward_of_its_own])
def test_other_layers_are_left_to_vllm(alter: Callable[[BaseLinearLayerWithLoRA], None]) -> None:
    make, kind, _ = LAYERS["replicated"]
    module = _module(make(), kind)
    assert lora_columns.has_columns(module)
    alter(module)
    assert not lora_columns.has_columns(module)


@pytest.mark.parametrize(("second", "used"), [(0.01, True), (0.5, False), (float("nan"), False)])
def test_kernels_that_differ_from_torch_are_left_out(
    monkeypatch: pytest.MonkeyPatch, second: float, used: bool
) -> None:
    kernel = SimpleNamespace(one_product=lambda: None, takes=None)
    monkeypatch.setattr(vllm_compat, "expand_kernel", kernel, raising=False)
    monkeypatch.setitem(sys.modules, "rollout_server.vllm_compat.expand_kernel", kernel)
    found = itertools.cycle([0.0, second])
    monkeypatch.setattr(one_product, "_difference", lambda *_: next(found))
    few = one_product._few_tokens.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert (few is not None) == used


def test_layers_whose_weights_other_kernels_read_have_no_spare_columns() -> None:
    class Router(linear.ReplicatedLinear):  # as vLLM's `GateLinear`
        pass

    router = Router(IN, OUT, bias=False, disable_tp=True, params_dtype=torch.bfloat16)
    assert router.weight.is_contiguous()


def test_a_server_without_lora_has_no_spare_columns() -> None:
    with set_current_vllm_config(VllmConfig()):
        assert _qkv().weight.is_contiguous()
