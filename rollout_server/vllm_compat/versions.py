"""The supported vLLM versions, and functions for vLLM's APIs that differ between them or are private.

Everything in `rollout_server.vllm_compat` was written for vLLM 0.26 to 0.33. Modules and what they rely on:

| module | relies on |
| --- | --- |
| versions | entry points and exceptions of the OpenAI app (two names, both are tried), AsyncLLM's output processor |
| versions | the pool of tokenizers, where there is one; `LogprobsProcessor.from_new_request` |
| versions, on CPUs | `dispatch_cpu_unquantized_gemm`; `_sample` and `_bookkeeping_sync` of the model runner |
| versions | `do_kv_cache_update` of `FlexAttentionImpl`, and on CPUs of `CPUAttentionBackendImpl` |
| linears | linear layers, packed modules, the names mapper (two names of its method, both are tried) |
| lora_slots | the worker's LoRA manager and LoRA layers, `MergedQKVParallelLinearWithLoRA.output_slices` |
| kept_mass | both samplers: V1 in `vllm/v1/sample`, V2 in `vllm/v1/worker/gpu/sample` |
| cpu_lora | `PunicaWrapperCPU` |
| experts | `from_layer` of the LoRA manager's module, `FusedMoEConfig.is_lora_enabled` |
| versions, at start | the model registry and `supports_lora` |
| versions, at start | `validate_parsed_serve_args`, `validate_api_server_args` (in two modules, both are tried) |
| lora_columns | `UnquantizedLinearMethod.create_weights`, `LoRAModelManager._create_lora_modules` |
| lora_columns | LoRA layers' `apply`, `_token_lora_indices` and (GPU) `token_mapping_meta` of Punica wrappers |
| one_product | `linear_batch_invariant` (in two modules, both are tried) |
| topology | `ParallelConfig` |
| ray_executor | `RayExecutorV2` and `RayWorkerProc`, `Executor.get_class`, `ray_device_key` of the CPU platform |
| hosts_executor | `MultiprocExecutor` (`monitor_workers`, `workers`), `Executor.get_class` |
| vision | the renderer and its processors (`_maybe_apply_prompt_updates`) |
| message_streams | `AnthropicServingMessages.message_stream_converter` |
| tool_calls | `AnthropicServingMessages.messages_full_converter`, classes of calls that tool parsers make |
| pil_processors | the model registry's `_run_in_subprocess` |
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from types import MethodType, SimpleNamespace
from typing import Any

from shared.media import media_token_ids
from shared.messages import one_line
from shared.model_files import take_chat_template


def vllm_version() -> str:
    """Return the installed vLLM's version; raises `RuntimeError` outside the supported range."""
    import vllm

    release = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    low, high = (0, 26), (0, 33)
    if not low <= release <= high:
        raise RuntimeError(
            f"vLLM {vllm.__version__} is not supported; install a version from {low[0]}.{low[1]} to {high[0]}.{high[1]}"
        )
    return vllm.__version__


def _first_module(new: str, old: str) -> Any:
    try:
        return importlib.import_module(new)
    except ModuleNotFoundError as error:
        if error.name is None or not new.startswith(error.name):
            raise
    return importlib.import_module(old)


def make_arg_parser(parser: Any) -> Any:
    """Add vLLM's serve flags to `parser`."""
    module = _first_module("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
    return module.make_arg_parser(parser)


def check_serve_args(args: Any) -> None:
    """Import plugins, and check flags as `vllm serve` does before it loads a model; raises `ValueError`."""
    cli_args = _first_module("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
    launcher = _first_module("vllm.entrypoints.launchers.launcher", "vllm.entrypoints.openai.api_server")
    try:
        cli_args.validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            launcher.ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            launcher.ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        launcher.validate_api_server_args(args)
    except KeyError as error:  # whose text is quoted
        raise ValueError(error.args[0]) from error
    except refusals() as error:
        raise ValueError(one_line(error)) from error


def build_openai_app(args: Any, supported_tasks: tuple[str, ...], model_config: Any) -> Any:
    """Build vLLM's FastAPI app with its OpenAI routes, which may still be given exception handlers."""
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


class _AnyModel(dict[str, Any]):
    """Adapters by name, in which every name is found while `accepts`; `missing` is told of those that are not."""

    def __init__(self, accepts: Callable[[], bool], missing: Callable[[str], None]) -> None:
        self._accepts, self._missing = accepts, missing

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or self._accepts():
            return True
        self._missing(str(name))
        return False

    def __missing__(self, name: str | None) -> Any:
        return lora_request(name or "policy", 1)


def accept_any_model(state: Any, accepts: Callable[[], bool], missing: Callable[[str], None]) -> None:
    """Let requests to the routes of `init_openai_state` name any model while `accepts` (0.26 to 0.33).

    Args:
        missing: called with the name of a model that there is not; vLLM's own refusal names bases only.
    """
    state.openai_serving_models.lora_requests = _AnyModel(accepts, missing)


def lora_request(name: str, slot_id: int) -> Any:
    """Return vLLM's request for the adapter in a slot, which is never read from a file."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, slot_id, "/in-memory")


async def init_openai_state(engine: Any, state: Any, args: Any, supported_tasks: tuple[str, ...]) -> None:
    """Put the serving objects of vLLM's OpenAI routes into `state`; all of them call `engine`."""
    module = _first_module("vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.openai.api_server")
    await module.init_app_state(engine, state, args, supported_tasks)


def without_lora(model_config: Any) -> str | None:
    """Return why vLLM cannot serve a model with LoRA adapters (0.26 to 0.33); None if it can.

    The engine would find out only after it has taken its memory.
    """
    from vllm.model_executor.models import supports_lora

    try:
        kind, name = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    except ImportError as error:
        package = f": pip install {error.name.partition('.')[0]}" if error.name else ""
        return f"the model cannot be loaded ({one_line(error)}){package}"
    if not supports_lora(kind):
        return f"vLLM cannot serve a {name} with LoRA adapters; take a model of another architecture (Llama, Qwen, ...)"
    return None


def without_kernel(model_config: Any) -> str | None:
    """Return why a model's layers cannot be computed on this machine, where its engine would die of it; else None."""
    import torch
    from vllm.platforms import current_platform

    text = getattr(model_config, "hf_text_config", None)
    hybrid = "linear_attention" in (getattr(text, "layer_types", None) or ())
    if hybrid and current_platform.is_cpu() and model_config.dtype != torch.bfloat16:
        return (
            f"--dtype {str(model_config.dtype).removeprefix('torch.')}: gated delta nets need --dtype bfloat16 on CPUs"
        )
    return None


def takes_images(model_config: Any) -> bool:
    """Return whether a multimodal model is served with its encoders (0.26 to 0.33): not with --language-model-only."""
    options = getattr(model_config, "multimodal_config", None)
    return bool(getattr(model_config, "is_multimodal_model", False)) and not getattr(
        options, "language_model_only", False
    )


def media_tokens(model_config: Any) -> list[int]:
    """Return the ids of tokens that stand for images, videos and sounds, of a model that is served without its encoders
    (--language-model-only), too: they mean nothing there.
    """
    if not getattr(model_config, "is_multimodal_model", False):
        return []
    vocabulary = model_config.get_vocab_size()
    return sorted(token for token in media_token_ids(model_config.hf_config) if 0 <= token < vocabulary)


def image_token(model_config: Any) -> int:
    """Return the id of the token that stands for a part of an image; configurations have it under two names."""
    config = model_config.hf_config
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def refusals() -> tuple[type[Exception], ...]:
    """Return the exceptions with which vLLM refuses a request: Python's in 0.26, classes of its own in 0.32.

    Its message format raises OverflowError for integers beyond 64 bits.
    """
    return (ValueError, TypeError, OverflowError, *own_refusals())


def own_refusals() -> tuple[type[Exception], ...]:
    """Return those of `refusals` that are vLLM's own classes."""
    return _named_errors("VLLMClientError", "VLLMValidationError")


def overload_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions with which AsyncLLM refuses a request because of its limits; earlier versions have none."""
    return _named_errors("QueueOverflowError", "MaxQueuedTokensError")


def refused(error: BaseException) -> BaseException | None:
    """Return why AsyncLLM has refused a request, where its `EngineGenerateError` hides it; else None."""
    from vllm.v1.engine.exceptions import EngineGenerateError

    cause = error.__cause__ if isinstance(error, EngineGenerateError) else None
    return cause if isinstance(cause, refusals()) else None


def http_error(status: int, message: str) -> Exception:
    """Return the error that vLLM's routes report with this status, in streams too where its version can."""
    from fastapi import HTTPException
    from vllm import exceptions

    if (graceful := getattr(exceptions, "GracefulHTTPError", None)) is not None:
        return graceful(message, HTTPStatus(status))  # type: ignore[no-any-return]
    return HTTPException(status, message)


def _named_errors(*names: str) -> tuple[type[Exception], ...]:
    from vllm import exceptions

    return tuple(error for name in names if (error := getattr(exceptions, name, None)) is not None)


def copy_tokenizer(engine: Any) -> Any:
    """Return a copy of the engine's tokenizer that one thread may use, with the chat template of the learners.

    None without a tokenizer.

    vLLM keeps as many as its own threads need. Whichever thread asks for one more makes it, which takes a second, and
    may be the event loop.
    """
    from vllm.tokenizers import hf

    try:
        tokenizer = engine.get_tokenizer()
    except ValueError:
        return None
    if isinstance(tokenizer, getattr(hf, "ThreadSafeHFTokenizerMixin", ())):
        tokenizer = tokenizer.__reduce__()[1][0]  # the one that the others are copies of
    ours, model = copy.deepcopy(tokenizer), engine.model_config
    take_chat_template(ours, model.tokenizer, model.tokenizer_revision, sees=takes_images(model))
    return ours


def leave_flat_logprobs_without_text() -> None:
    """Let AsyncLLM of this process make no text of flat logprobs of sampled tokens alone (0.26 to 0.33).

    No route of vLLM asks for these, and vLLM would decode every sampled token a second time for them, on the event
    loop: several times the work of all else that a logprob needs.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from_new_request = LogprobsProcessor.from_new_request

    def without_text(tokenizer: Any, request: Any) -> Any:
        params = request.sampling_params
        return from_new_request(None if params.flat_logprobs and not params.logprobs else tokenizer, request)

    LogprobsProcessor.from_new_request = without_text


def output_tokens(engine: Any) -> dict[tuple[str, int], int]:
    """Count the tokens so far of every output in AsyncLLM, by the caller's request id and output index."""
    states = engine.output_processor.request_states.values()
    return {
        (state.external_req_id, state.request_index): state.detokenizer.num_output_tokens()
        for state in states
        if state.detokenizer is not None
    }


def fail_requests(engine: Any) -> None:
    """End every request in AsyncLLM with the error of a dead engine, as AsyncLLM itself would."""
    engine.output_processor.propagate_error(engine_dead_error()())


def engine_dead_error() -> type[Exception]:
    """Return the class of the error that AsyncLLM raises in requests whose engine has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def coordinator(engine: Any) -> int | None:
    """Return the process that spreads requests over data-parallel engines; None if there is none (0.26 to 0.33)."""
    found = getattr(getattr(engine.engine_core, "resources", None), "coordinator", None)
    return None if found is None else int(found.proc.pid)


def submitted_requests(engine: Any) -> set[str]:
    """Return the caller's ids of all requests that AsyncLLM has handed to the engine with all their outputs."""
    states = engine.output_processor.request_states.values()
    outputs = Counter(state.external_req_id for state in states)
    wanted = {state.external_req_id: 1 if state.parent_req is None else state.parent_req.n for state in states}
    return {request_id for request_id, n in wanted.items() if outputs[request_id] == n}


def batch_invariant_kernels() -> Any:
    """Return vLLM's module of products whose results do not depend on the batch."""
    new, old = "vllm.model_executor.determinism.batch_invariant", "vllm.model_executor.layers.batch_invariant"
    return _first_module(new, old)


@functools.cache
def linear_function() -> Any:
    """Return the function with which vLLM's unquantized linear layers compute: (x, weight, bias) -> y."""
    import torch
    from vllm import envs
    from vllm.platforms import current_platform

    if envs.VLLM_BATCH_INVARIANT and current_platform.is_cuda():
        return batch_invariant_kernels().linear_batch_invariant
    return torch.nn.functional.linear


def keep_linear_weights_on_cpu() -> None:
    """Let linear layers of vLLM's CPU backend compute with `layer.weight`; no effect on other backends.

    The backend would pack the weights for its own kernels when the model is loaded, and leave `layer.weight` empty.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.layers import utils

    dispatch = utils.dispatch_cpu_unquantized_gemm

    def dispatch_but_linears(layer: Any, remove_weight: bool) -> None:
        if remove_weight and layer.weight.dim() == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch_but_linears


def keep_blocks_clean() -> None:
    """Zero a block of the KV cache as a sequence begins it, for attention that lets what was there before through.

    The CPU's and FlexAttention multiply what lies in a block behind the sequence's end by 0, and 0 times NaN is NaN: a
    run that has diverged left blocks behind in which all tokens of whoever came next were NaN, whatever the run.
    FLASH_ATTN and TRITON_ATTN do not.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import flex_attention

    implementations: list[Any] = [flex_attention.FlexAttentionImpl]
    if current_platform.is_cpu():
        from vllm.v1.attention.backends import cpu_attn

        implementations.append(cpu_attn.CPUAttentionBackendImpl)
    for implementation in implementations:
        if hasattr(implementation, "do_kv_cache_update"):  # earlier versions write within the attention
            zero_begun_blocks(implementation)


def zero_begun_blocks(implementation: Any) -> None:
    """Let an implementation of attention zero the blocks in which slots are the first."""
    update = implementation.do_kv_cache_update

    def update_clean(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        blocks = begun_blocks(slot_mapping, kv_cache.shape[2], fixed=kv_cache.is_cuda)  # [blocks, heads, tokens, ...]
        kv_cache.index_fill_(0, blocks, 0)
        update(self, layer, key, value, kv_cache, slot_mapping)

    implementation.do_kv_cache_update = update_clean


def begun_blocks(slot_mapping: Any, size: int, *, fixed: bool) -> Any:
    """Return the blocks whose first slots are among slots [T], -1 being none.

    Args:
        fixed: return [T], as CUDA graphs need it, filled up with block 0, which vLLM gives to nobody.
    """
    begins = slot_mapping % size == 0
    blocks = slot_mapping // size
    return blocks.masked_fill(~begins, 0) if fixed else blocks[begins]


def keep_seeds_alive_on_cpu(worker: Any) -> None:
    """Let seeded requests survive chunked prefill on the CPU backend.

    While a prompt is prefilled in chunks, vLLM samples a token, discards it and rewinds the request's generator by a
    CUDA offset. CPU generators have no offset: the call raises and the engine dies. This patch restores the generator's
    complete state instead.
    """
    runner = worker.model_runner
    if str(worker.device.type) != "cpu" or not hasattr(runner, "_bookkeeping_sync"):
        return
    sample, bookkeeping = runner._sample, runner._bookkeeping_sync

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
