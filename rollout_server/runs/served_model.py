"""Description of the served model, which learners check before they use the server."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions
from shared.fingerprint import fingerprint_checkpoint
from shared.weights import BaseFingerprint, ServerState


def policy_altering(vllm_config: Any) -> list[str]:
    """Return the engine options under which logprobs differ from the policy's."""
    reasons = []
    if vllm_config.speculative_config is not None:
        reasons.append("speculative decoding (--speculative-config)")
    kv_dtype = str(vllm_config.cache_config.cache_dtype)
    if kv_dtype not in ("auto", "bfloat16", "float16", "float32", "float", "half"):
        reasons.append(f"a quantized KV cache (--kv-cache-dtype {kv_dtype})")
    return reasons


def describe(
    vllm_config: Any, workers: list[dict[str, Any]], max_lora_rank: int, settings: ServerSettings, boot_id: str
) -> ServerState:
    """Describe what does not change, from vLLM's configuration, the checkpoint and the `workers`' own `describe`."""
    model, lora = vllm_config.model_config, vllm_config.lora_config
    text = model.hf_text_config
    dummy = str(vllm_config.load_config.load_format) == "dummy"
    unknown = BaseFingerprint(weights=None, tokenizer=None, chat_template=None)
    return ServerState(
        epoch=boot_id,
        ready=True,
        model=model.model,
        base=unknown if dummy else fingerprint_checkpoint(model.model, model.revision),
        vllm_version=versions.vllm_version(),
        device=str(vllm_config.device_config.device_type),
        dtype=_dtype_name(model.dtype),
        lora_dtype=_dtype_name(lora.lora_dtype if lora else model.dtype),
        max_model_len=model.max_model_len,
        max_lora_rank=max_lora_rank,
        slots_per_run=1 if settings.merges else settings.slots_per_run,
        slot_bytes=max(worker.get("slot_bytes", 0) for worker in workers),
        max_runs=settings.max_runs,
        apply=settings.apply,
        workers=len(workers),
        devices=[worker["device"] for worker in workers],
        logprobs_mode=str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
        policy_altering=policy_altering(vllm_config),
        allowed_altering=settings.allow_policy_altering,
        deterministic=settings.deterministic,
        shares_gpu=settings.share_gpu,
        quantization=str(model.quantization) if model.quantization else None,
        mixture_of_experts=bool(getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)),
        max_images=settings.max_images if versions.takes_images(model) else 0,
        max_image_bytes=settings.max_image_mib * 2**20,
        max_image_pixels=settings.max_image_pixels,
        max_image_memory=settings.max_bodies_mib * 2**20 // 4,  # beside its body, and beside other requests
        max_body_bytes=settings.max_body_mib * 2**20,
    )


def terms(vllm_config: Any, settings: ServerSettings) -> dict[str, str]:
    """Return what must be the same on all hosts of an engine (`--nnodes`), by the flag that sets it.

    Each host makes its workers from its own flags: others would stop all of them in their first step together, or
    serve something else.
    """
    model, lora, parallel = vllm_config.model_config, vllm_config.lora_config, vllm_config.parallel_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    dummy = str(vllm_config.load_config.load_format) == "dummy"
    weights = None if dummy else fingerprint_checkpoint(model.model, model.revision).weights
    own = ("_name_or_path", "transformers_version")  # of a host
    config = {key: value for key, value in model.hf_config.to_dict().items() if key not in own}
    values: dict[str, Any] = {
        "the model's configuration": _digest(json.dumps(config, sort_keys=True, default=str)),
        "the model's weights": weights or "unknown",
        "vLLM's version": versions.vllm_version(),
        "lockstep's version": _own_version(),
        "--tensor-parallel-size": parallel.tensor_parallel_size,
        "--nnodes": parallel.nnodes,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--compilation-config": _compiled(vllm_config.compilation_config),
        "--attention-backend": getattr(getattr(vllm_config, "attention_config", None), "backend", None),
        "--lora-dtype": lora.lora_dtype if lora else None,
        "--apply": settings.apply,
        "--keep-base": settings.keep_base,
        "--max-lora-rank": lora.max_lora_rank if lora else None,
        "--slots-per-run and --max-runs": settings.adapter_slots,
        "--dtype": model.dtype,
        "--quantization": model.quantization,
        "--max-model-len": model.max_model_len,
        "--max-num-seqs": scheduler.max_num_seqs,
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--block-size": cache.block_size,
        "--kv-cache-dtype": cache.cache_dtype,
        "--num-gpu-blocks-override": cache.num_gpu_blocks_override,
        "--enforce-eager": model.enforce_eager,
        "--seed": model.seed,
        "--deterministic": settings.deterministic,
        "--logprobs-mode": getattr(model.logprobs_mode, "value", model.logprobs_mode),
    }
    return {name: str(value) for name, value in values.items()}


def _compiled(compilation: Any) -> str:
    """Return how steps are compiled, in which workers that step together must be alike (0.26 to 0.33)."""
    return f"mode {compilation.mode}, {compilation.cudagraph_mode}"


def _own_version() -> str:
    try:
        return version("lockstep-rl")
    except PackageNotFoundError:  # run in its repository
        return "unknown"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dtype_name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.")
