"""From flags to a served, warmed-up engine, and back down again."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from rollout_server import compat, identity
from rollout_server.app import build_app
from rollout_server.engine import EngineDoor
from rollout_server.gate import Gate
from rollout_server.groups import Groups
from rollout_server.installs import Installer
from rollout_server.run_table import RunTable
from rollout_server.sampling import token_prompt
from rollout_server.service import Service
from rollout_server.settings import ServerSettings
from rollout_server.turns import Turns
from rollout_server.workers import Workers
from shared.errors import ErrorCode, LockstepError

logger = logging.getLogger("rollout_server")

_REGISTER_SECONDS = 600.0
_WATCH_SECONDS = 1.0


def _start_engine(vllm_config: Any, args: Any) -> Any:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )


async def start(args: Any, vllm_config: Any, settings: ServerSettings, gate: Gate) -> Service:
    """Load the model, register the slots, warm up, open the gate."""
    started = time.monotonic()
    # On a thread: loading takes minutes, and /health has to answer all the while.
    engine = await asyncio.to_thread(_start_engine, vllm_config, args)
    gate.on_close(lambda: engine.shutdown())
    runs = RunTable(settings.slots_per_run, settings.max_runs, merged=settings.merges)
    door = EngineDoor(engine, runs)
    await engine.reset_mm_cache()
    rank: int = args.max_lora_rank
    serving = (settings.keep_base,) if settings.merges else (list(range(1, settings.adapter_slots + 1)), rank)
    workers, described = await _reach_workers(door, serving, vllm_config.parallel_config.world_size)
    served = await asyncio.to_thread(identity.describe, vllm_config, described, rank)
    epoch = secrets.token_hex(8)
    groups = Groups(workers, settings, backend="nccl" if described[0]["device"] else "gloo")
    installer = Installer(door, workers, groups, runs, served, settings, epoch)
    gate.on_close(installer.staging.close)
    logger.info("model loaded after %.0f s, %s; warming up", time.monotonic() - started, described[0])
    await _warm_up(engine, lora=not settings.merges)
    tasks = await engine.get_supported_tasks()
    openai_app = compat.build_openai_app(args, tasks, vllm_config.model_config)
    await compat.init_openai_state(door, openai_app.state, args, tasks)
    models, turns = openai_app.state.openai_serving_models, Turns(door, enabled=settings.deterministic)
    service = Service(settings, door, runs, served, installer, epoch, models, turns)
    gate.open(build_app(service, openai_app), healthy=lambda: not door.errored)
    logger.info("ready after %.0f s: %s, epoch %s", time.monotonic() - started, served.model, epoch)
    return service


async def _reach_workers(
    door: EngineDoor, serving: tuple[Any, ...], count: int
) -> tuple[Workers, list[dict[str, Any]]]:
    """Prepare all workers, and open a socket to each.

    Args:
        serving: what `lockstep_register` of our worker class wants to know first.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        described = await door.register_workers(*serving, os.getpid(), folder, timeout=_REGISTER_SECONDS)
        sockets = sorted(Path(folder).glob("*.sock"))  # noqa: ASYNC240 - a handful of names in a folder of ours
        return await Workers.connect(sockets, count), described


async def _warm_up(engine: Any, *, lora: bool) -> None:
    """One short generation with and without adapter: the first ones compile and allocate for many seconds."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=4, logprobs=0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)

    async def run(index: int, request: LoRARequest | None) -> None:
        prompt = {**token_prompt([index + 1] * 16), "cache_salt": "lockstep:warm-up"}
        async for _ in engine.generate(prompt, params, f"warm-up-{bool(request)}-{index}", lora_request=request):
            pass

    for request in (None, LoRARequest("slot-1", 1, "/in-memory")) if lora else (None,):
        await asyncio.gather(*(run(index, request) for index in range(4)))


async def watch(service: Service) -> None:
    """Return when the engine has died, with the reason in the log. Never answers with a dead engine behind it."""
    while not service.door.errored:  # noqa: ASYNC110 - vLLM has no event for it
        await asyncio.sleep(_WATCH_SECONDS)
    logger.error(
        "the engine died: %s; this server stops so that its supervisor can restart it", service.door.dead_error
    )


def refuse_what_cannot_work(vllm_config: Any, settings: ServerSettings) -> None:
    """Refusals that need vLLM's resolved configuration.

    Raises:
        LockstepError: with what to do instead.
    """
    altering = identity.policy_altering(vllm_config)
    if altering and not settings.allow_policy_altering:
        raise _refusal(
            f"{' and '.join(altering)} make the logprobs differ from the policy's; "
            "leave them out, or accept that with --allow-policy-altering"
        )
    mode = vllm_config.model_config.logprobs_mode
    if str(getattr(mode, "value", mode)) != "processed_logprobs":
        raise _refusal(
            f"--logprobs-mode {mode}: a learner needs the logprobs that tokens were drawn with; "
            "leave the flag out (processed_logprobs)"
        )
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise _refusal(
            "data- and pipeline-parallel engines cannot be proven to hold one adapter everywhere; use "
            "--tensor-parallel-size, or start several rollout servers"
        )
    if settings.merges and (vllm_config.model_config.quantization or vllm_config.model_config.use_mla):
        raise _refusal(
            "--apply merge writes plain weights, and this model computes with others made of them (quantised, or MLA): "
            "use --apply adapter"
        )
    if getattr(vllm_config.model_config, "is_multimodal_model", False):
        raise _refusal("vision and audio models are not supported yet; serve a text model")


def _refusal(message: str) -> LockstepError:
    return LockstepError(ErrorCode.INVALID_REQUEST, message)
