"""Everything that differs between the vLLM versions this server supports (0.26 to 0.33), and the one place that
reaches into vLLM's private parts. Each function says which versions it was written for.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

SUPPORTED = ((0, 26), (0, 33))


def vllm_version() -> str:
    """The installed vLLM's version.

    Raises:
        RuntimeError: it lies outside the supported range.
    """
    import vllm

    release = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    low, high = SUPPORTED
    if not low <= release <= high:
        raise RuntimeError(
            f"vLLM {vllm.__version__} is not supported; install a version from {low[0]}.{low[1]} to {high[0]}.{high[1]}"
        )
    return vllm.__version__


def _first_module(*names: str) -> Any:
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    return importlib.import_module(names[-1])


def make_arg_parser(parser: Any) -> Any:
    """vLLM's serve flags added to `parser`."""
    module = _first_module("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
    return module.make_arg_parser(parser)


def build_openai_app(args: Any, supported_tasks: tuple[str, ...], model_config: Any) -> Any:
    """vLLM's FastAPI app with its OpenAI routes, which may still be given exception handlers (0.26 to 0.33)."""
    module = _first_module("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server")
    app = module.build_app(args, supported_tasks, model_config)
    app.middleware_stack = None  # built already, with the handlers that there were; the first request builds it again
    # vLLM's handler of engine errors tells its uvicorn to stop; `lifecycle` stops ours.
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def list_models(state: Any, names: list[str]) -> None:
    """Show adapters of these names, and no others, as models on the routes of `init_openai_state` (0.26 to 0.33)."""
    listed = state.openai_serving_models.lora_requests
    listed.clear()
    listed.update({name: lora_request(name, 1) for name in names})


def lora_request(name: str, slot_id: int) -> Any:
    """vLLM's request for the adapter in a slot, which is never read from a file."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, slot_id, "/in-memory")


async def init_openai_state(engine: Any, state: Any, args: Any, supported_tasks: tuple[str, ...]) -> None:
    """Hang the serving objects behind vLLM's OpenAI routes on `state`, all of them talking to `engine`."""
    module = _first_module("vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.openai.api_server")
    await module.init_app_state(engine, state, args, supported_tasks)


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises at a request that it refuses: errors of Python's in 0.26, a family of its own in 0.32.

    OverflowError is what its message format says to integers beyond 64 bits.
    """
    from vllm import exceptions

    own = [getattr(exceptions, name, None) for name in ("VLLMClientError", "VLLMValidationError")]
    return (ValueError, TypeError, OverflowError, *(error for error in own if error is not None))


def lora_manager(worker: Any) -> Any:
    """vLLM's adapter manager of one worker: `modules`, `packed_modules`, `lora_index_to_id`."""
    return worker.model_runner.lora_manager._adapter_manager


def pin_empty_adapter(worker: Any, slot_id: int, rank: int) -> None:
    """Register a zero adapter of `rank` under `slot_id`, put it into a GPU slot and pin it there for good."""
    manager = worker.model_runner.lora_manager
    manager.add_dummy_lora(lora_request(f"slot-{slot_id}", slot_id), rank=rank)
    manager._adapter_manager.activate_adapter(slot_id)
    manager.pin_adapter(slot_id)


def slot_index(worker: Any, slot_id: int) -> int:
    """Where in the stacked buffers the adapter `slot_id` lies at present."""
    return lora_manager(worker).lora_index_to_id.index(slot_id)


def swap_adapters(worker: Any, one: int, other: int) -> None:
    """Exchange the GPU slots of two pinned adapters, between two engine steps: no tensor moves."""
    manager = lora_manager(worker)
    order = manager.lora_index_to_id
    i, j = order.index(one), order.index(other)
    order[i], order[j] = order[j], order[i]
    manager._last_mapping = None  # or a batch that stays the same would keep the old slot


def output_tokens(engine: Any) -> dict[tuple[str, int], int]:
    """Tokens so far of every output that AsyncLLM is processing, by the caller's request id and output index."""
    states = engine.output_processor.request_states.values()
    return {
        (state.external_req_id, state.request_index): state.detokenizer.num_output_tokens()
        for state in states
        if state.detokenizer is not None
    }


def fail_requests(engine: Any) -> None:
    """End every request that AsyncLLM is processing with the error of a dead engine, as AsyncLLM itself would."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine.output_processor.propagate_error(EngineDeadError())


def engine_dead_error() -> type[Exception]:
    """What AsyncLLM raises in requests whose engine has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def submitted_requests(engine: Any) -> set[str]:
    """The caller's ids of all requests that AsyncLLM has handed to the engine with every one of their outputs."""
    outputs: Counter[str] = Counter()
    wanted: dict[str, int] = {}
    for state in engine.output_processor.request_states.values():
        outputs[state.external_req_id] += 1
        wanted[state.external_req_id] = state.parent_req.n if state.parent_req is not None else 1
    return {request_id for request_id, n in wanted.items() if outputs[request_id] == n}


def vllm_module_name(model: Any, peft_name: str) -> str:
    """The served model's own name for a module that PEFT calls `peft_name`."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        rename = getattr(mapper, "get_rename_mapper", None) or getattr(mapper, "get_unstacked_mapper", None)
        mapper = rename() if rename is not None else mapper
    return parse_fine_tuned_lora_name(f"base_model.model.{peft_name}.lora_A.weight", mapper)[0]


def packed_modules(model: Any) -> dict[str, list[str]]:
    """Last part of a fused layer's name -> those of the modules fused in it (`qkv_proj` -> q_proj, k_proj, v_proj)."""
    from vllm.model_executor.utils import get_packed_modules_mapping

    return get_packed_modules_mapping(model)


def plain_linears(model: Any) -> dict[str, Any]:
    """All linear layers that compute with `layer.weight` as it lies there, by name."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LinearBase)
        and type(layer.quant_method) is UnquantizedLinearMethod
        and layer.weight.dim() == 2
    }


def linear_parts(layer: Any) -> tuple[list[tuple[int, int, int]], tuple[int, int]]:
    """How the weight [out, in] of a linear layer is fused and sharded.

    Returns:
        For every fused part, in the order of the weight's rows: rows on this worker, the first of them among the
        part's output features, output features of all workers. And: first input feature on this worker, how many.
    """
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
        return [(own * each, own * each * index, total * each) for own, index, total, each in heads], every_column
    if isinstance(layer, linear.MergedColumnParallelLinear):
        return [(n // shards, n // shards * rank, n) for n in layer.output_sizes], every_column
    if isinstance(layer, linear.RowParallelLinear):
        own = layer.input_size_per_partition
        return [(layer.output_size, 0, layer.output_size)], (own * rank, own)
    if isinstance(layer, linear.ColumnParallelLinear):
        own = layer.output_size_per_partition
        return [(own, own * rank, layer.output_size)], every_column
    return [(layer.output_size, 0, layer.output_size)], every_column


def keep_linear_weights_on_cpu() -> None:
    """Let linear layers of vLLM's CPU backend (0.26 to 0.33) compute with `layer.weight`; no effect elsewhere.

    It would pack the weights for its own kernels when the model is loaded, and leave `layer.weight` empty.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.layers import utils

    dispatch: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm

    def dispatch_but_linears(layer: Any, remove_weight: bool) -> None:
        if remove_weight and layer.weight.dim() == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch_but_linears


def keep_seeds_alive_on_cpu(worker: Any) -> None:
    """Let seeded requests survive chunked prefill on the CPU backend.

    While a prompt is still being prefilled in chunks vLLM samples a token, throws it away and rewinds the request's
    generator by a CUDA offset. CPU generators have no offset: the call raises and the engine dies (0.25 to 0.33).
    Here the generator's whole state is put back instead, which is what the rewind is for.
    """
    runner = worker.model_runner
    if str(worker.device.type) != "cpu" or not hasattr(runner, "_bookkeeping_sync"):
        return
    sample: Callable[..., Any] = runner._sample
    bookkeeping: Callable[..., Any] = runner._bookkeeping_sync

    def discarded(self: Any) -> list[int]:
        rows = self.discard_request_mask.np[: self.input_batch.num_reqs]
        return [row for row in self.input_batch.generators if row < len(rows) and rows[row]]

    def sample_and_rewind(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        states = {row: generators[row].get_state() for row in discarded(self)}
        output = sample(*args, **kwargs)
        for row, state in states.items():
            generators[row].set_state(state)
        return output

    def bookkeeping_without_rewind(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        aside = {row: generators.pop(row) for row in discarded(self)}
        try:
            return bookkeeping(*args, **kwargs)
        finally:
            generators.update(aside)

    runner._sample = MethodType(sample_and_rewind, runner)
    runner._bookkeeping_sync = MethodType(bookkeeping_without_rewind, runner)


def report_kept_mass(worker: Any) -> None:
    """Let the worker's sampler (0.26 to 0.33 have the same two) say how much mass truncation kept."""
    from rollout_server.vllm_compat import kept_mass

    kept_mass.install(worker.model_runner.sampler)


def speed_up_cpu_lora() -> None:
    """Replace the linear LoRA of vLLM's CPU backend (0.26 to 0.33 have the same one); no effect elsewhere.

    Must run before the model is loaded: a compiled graph keeps what it was traced with.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        from rollout_server.vllm_compat import cpu_lora

        cpu_lora.install(PunicaWrapperCPU)


def cache_environment() -> None:
    """Let vLLM's front end read its environment variables once, as its engine does; else it does so for every token
    (0.26 to 0.33)."""
    from vllm import envs

    envs.enable_envs_cache()
