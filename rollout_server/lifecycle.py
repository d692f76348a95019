"""From flags to a served, warmed-up engine, and back down again."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout_server.api import metrics
from rollout_server.api.app import build_app
from rollout_server.api.middleware.limits import LimitsMiddleware
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.engine.capacity import Capacity
from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import EngineProxy, in_session
from rollout_server.engine.sleep import Sleep
from rollout_server.engine.watchdog import StallWatchdog
from rollout_server.generation.images import ImageLimits
from rollout_server.generation.vllm_params import token_prompt
from rollout_server.installs.broadcast_groups import BroadcastGroups
from rollout_server.installs.installer import Installer
from rollout_server.installs.slot_install import InstallContext
from rollout_server.ipc import tcp
from rollout_server.ipc.client import WorkerAddress, Workers
from rollout_server.ipc.hosts import Head, Meeting
from rollout_server.runs import served_model
from rollout_server.runs.table import RunTable
from rollout_server.service import Service
from rollout_server.sessions.records import Sessions
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import log_filter, message_streams, start_errors, tool_calls, topology, versions, vision
from shared.collections_off import without_collections
from shared.errors import EngineDead, InvalidRequest
from shared.messages import one_line

logger = logging.getLogger("lockstep.lifecycle")

#: Slices of a fused layer: q, k, v.
_MOST_SLICES = 3
#: For other hosts of the engine to come: torch's own for its process groups (`default_pg_timeout`).
_MEETING_S = 1800.0
#: For a host that has ended to say why: the engine here notices at the same time, and says only that.
_REASON_S = 3.0
_KILL_S = 0.5


async def start(
    args: Any,
    vllm_config: Any,
    settings: ServerSettings,
    readiness: ReadinessMiddleware,
    capacity: Capacity,
    sessions: Sessions,
    token: str | None = None,
) -> Service:
    """Load the model, register the slots, warm up, and let requests in.

    Args:
        token: that all hosts of the engine were given, if it is on several (`--nnodes`).

    Raises:
        EngineDead: the engine has not come up, with its first error.
        InvalidRequest: another host of the engine was given other flags.
    """
    head = None
    if token is not None:
        head = Head(await asyncio.to_thread(meeting, vllm_config, settings, token), on_end=_say_lost)
        readiness.on_close(head.close)
        await head.meet()
    ending = asyncio.ensure_future(_end_engine(head)) if head else None
    with start_errors.reported_errors() as first_report:
        try:
            return await _start(args, vllm_config, settings, readiness, capacity, sessions, token, head)
        except Exception as error:
            reason = await head.reason(_REASON_S) if head else None
            raise EngineDead(
                f"vLLM could not start the engine: {reason or first_report() or one_line(error)}"
            ) from error
        finally:
            if ending:
                ending.cancel()


def meeting(vllm_config: Any, settings: ServerSettings, token: str) -> Meeting:
    """Return what a host of an engine over several hosts has to know of it; reads the checkpoint."""
    parallel = vllm_config.parallel_config
    address, port, nodes = parallel.master_addr, parallel.master_port, parallel.nnodes
    terms = served_model.terms(vllm_config, settings)
    timeout = float(getattr(parallel, "distributed_timeout_seconds", None) or _MEETING_S)  # not in all versions
    return Meeting(address, port, nodes, tcp.derived(token, "hosts"), terms, timeout)


def links_secret(token: str) -> bytes:
    """Return the secret of the links to the workers of an engine over several hosts."""
    return tcp.derived(token, "links")


def _say_lost(reason: EngineDead) -> None:
    logger.error("%s, while the engine starts", reason.message)


async def _end_engine(head: Head) -> None:
    """End an engine that is still starting once a host has ended: it would wait for that one."""
    await asyncio.shield(head.lost)
    while True:  # its process may only be about to begin
        for process in multiprocessing.active_children():
            process.kill()
        await asyncio.sleep(_KILL_S)


async def _start(
    args: Any,
    vllm_config: Any,
    settings: ServerSettings,
    readiness: ReadinessMiddleware,
    capacity: Capacity,
    sessions: Sessions,
    token: str | None,
    head: Head | None,
) -> Service:
    with without_collections():
        from vllm import envs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

    started = time.monotonic()
    versions.leave_flat_logprobs_without_text()
    sees = versions.takes_images(vllm_config.model_config)
    if sees:
        vision.prepare(vllm_config)
    secret = b""
    if topology.on_ray(vllm_config.parallel_config):
        from rollout_server.vllm_compat import ray_executor  # Ray is an extra

        ray_executor.use()
        secret = secrets.token_bytes(tcp.SECRET_BYTES)
    elif token is not None:
        from rollout_server.vllm_compat import hosts_executor

        hosts_executor.use()
        secret = links_secret(token)
    if secret:
        os.environ[tcp.VARIABLE] = secret.hex()
    try:
        # On a thread: loading takes minutes, and /health must answer meanwhile.
        engine = await asyncio.to_thread(
            AsyncLLM.from_vllm_config,
            vllm_config=vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
        )
    finally:
        os.environ.pop(tcp.VARIABLE, None)
    readiness.on_close(lambda: engine.shutdown())
    runs = RunTable(settings.slots_per_run, settings.max_runs, merged=settings.merges)
    proxy = EngineProxy(engine, runs, capacity)
    proxy.media_tokens = versions.media_tokens(vllm_config.model_config)
    if sees:
        vision.take_our_images(engine)
        scaling = await asyncio.to_thread(vision.scaling, engine)
        proxy.image_limits = ImageLimits.of(settings, *scaling.values())
    proxy.turn_tokenizer = await asyncio.to_thread(versions.copy_tokenizer, engine)
    rank: int = args.max_lora_rank
    serving = (settings.keep_base,) if settings.merges else (list(range(1, settings.adapter_slots + 1)), rank)
    workers = await _linked(engine, serving, vllm_config.parallel_config, secret, on_break=proxy.give_up)
    readiness.on_close(workers.close)
    if head:
        head.on_end = proxy.give_up
    described = await workers.call("describe", timeout=60.0)
    boot_id = secrets.token_hex(8)
    served = await asyncio.to_thread(served_model.describe, vllm_config, described, rank, settings, boot_id)
    backend = "nccl" if described[0]["device"] else "gloo"
    if sees:
        served = served.model_copy(update={"sight": vision.sight(engine), **scaling})
    groups = BroadcastGroups(workers, settings, backend, bind=workers.host or args.host or "0.0.0.0")
    sleep = Sleep(proxy, workers, enabled=settings.share_gpu, level=int(vllm_config.model_config.enable_sleep_mode))
    installer = Installer(InstallContext(proxy, workers, runs, boot_id), groups, served, settings, sleep)
    readiness.on_close(installer.staging.close)
    seconds = time.monotonic() - started
    logger.info("model loaded after %.0f s by %d workers, %s; warming up", seconds, len(workers), described[0])
    if settings.in_columns and (others := described[0]["linear"] - described[0]["in_columns"]):
        logger.warning(
            "--apply columns: %d of %d linear layers are quantized or not plain; vLLM's own kernels add LoRA there",
            others,
            described[0]["linear"],
        )
    await _warm_up(engine, vllm_config, lora=not settings.merges)
    await sleep.rehearse()
    tasks = await engine.get_supported_tasks()
    openai_app = versions.build_openai_app(args, tasks, vllm_config.model_config)
    await versions.init_openai_state(proxy, openai_app.state, args, tasks)
    message_streams.end_with_errors(openai_app.state)
    tool_calls.answer_all(openai_app.state)
    log_filter.leave_refusals_out()
    exclusive = Exclusive(proxy, enabled=settings.deterministic)
    versions.accept_any_model(openai_app.state, in_session, proxy.note_missing)
    service = Service(settings, served, runs, proxy, exclusive, installer, sessions, openai_app.state)
    metrics.SEQUENCES.set_function(lambda: capacity.sequences)
    metrics.REQUESTS.set_function(lambda: capacity.requests)
    metrics.POLICY_STEPS.served = runs.steps
    metrics.SESSIONS.sessions = sessions
    app = LimitsMiddleware(
        build_app(service, openai_app),
        settings,
        capacity,
        context=vllm_config.model_config.max_model_len,
        tool_server=bool(args.tool_server),
    )
    # All has been loaded: make later requests cheaper.
    gc.collect()
    gc.freeze()  # or every full collection walks over all that the imports left behind
    envs.enable_envs_cache()  # or the front end would read environment variables for every token
    readiness.open(app, healthy=lambda: not proxy.errored, ready=lambda: not capacity.draining)
    logger.info("ready after %.0f s: %s, boot id %s", time.monotonic() - started, served.model, boot_id)
    return service


async def _linked(
    engine: Any, serving: tuple[Any, ...], parallel: Any, secret: bytes, on_break: Callable[[EngineDead], None]
) -> Workers:
    """Prepare all workers to serve, and connect to them."""

    async def register(**link: Any) -> list[Any]:
        return await engine.collective_rpc("lockstep_register", timeout=600.0, args=(*serving, link))

    count = topology.workers(parallel)
    if secret:
        addresses = [WorkerAddress(*address) for address in await register()]
        assert len(addresses) == count
        return await Workers.connect_over_tcp(addresses, secret, on_break)
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        await register(server_pid=os.getpid(), coordinator_pid=versions.coordinator(engine), folder=folder)
        sockets = sorted(Path(folder).glob("*.sock"))  # noqa: ASYNC240 - a handful of names in a folder of ours
        return await Workers.connect(sockets, count, on_break)


async def _warm_up(engine: Any, vllm_config: Any, *, lora: bool) -> None:
    """Generate with and without adapter on each engine: the first requests compile and allocate for many seconds."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=4, logprobs=0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    engines = vllm_config.parallel_config.data_parallel_size
    # vLLM would refuse more; earlier versions have no such limit.
    room = asyncio.Semaphore(getattr(vllm_config.scheduler_config, "max_num_queued_reqs", None) or 4 * engines)

    async def run(rank: int, index: int, request: Any) -> None:
        prompt = {**token_prompt([index + 1] * 16), "cache_salt": "lockstep:warm-up"}
        name = f"warm-up-{bool(request)}-{rank}-{index}"
        async with room:
            async for _ in engine.generate(prompt, params, name, lora_request=request, data_parallel_rank=rank):
                pass

    for request in (None, versions.lora_request("slot-1", 1)) if lora else (None,):
        await asyncio.gather(*(run(rank, index, request) for rank in range(engines) for index in range(4)))


async def watch(service: Service) -> None:
    """Return when the engine has died, or hangs, with the reason in the log."""
    settings = service.settings
    stall = StallWatchdog(service.proxy, settings.engine_stall_seconds, sampling=not settings.deterministic)
    while not service.proxy.errored:
        await asyncio.sleep(1.0)
        stall.look()
    reason = service.proxy.dead_error
    logger.error("the engine died: %s; this server stops so that its supervisor can restart it", reason)


async def drained(service: Service) -> None:
    """Return when the server was asked to leave and has finished its work, or `--drain-seconds` later."""
    capacity, seconds = service.proxy.capacity, service.settings.drain_seconds
    if await capacity.drained(seconds):
        logger.info("drained: everything under way has been finished")
    else:
        logger.warning(
            "%d sequences of %d requests were still under way after --drain-seconds %g; they are ended",
            capacity.sequences,
            capacity.requests,
            seconds,
        )


def reason_against_columns(vllm_config: Any, settings: ServerSettings) -> str | None:
    """Return why `--apply auto` is not `columns` with vLLM's resolved configuration; None if it is."""
    model, lora = vllm_config.model_config, vllm_config.lora_config
    columns, width = _MOST_SLICES * settings.adapter_slots * lora.max_lora_rank, model.get_hidden_size()
    reasons = {
        f"in {model.dtype} small updates are not lost": model.dtype.itemsize > 2,
        "the base is quantized": model.quantization,
        "LoRA has a dtype of its own": lora.lora_dtype != model.dtype,
        "MLA's layers compute with other weights": model.use_mla,
        "LoRA is fully sharded": lora.fully_sharded_loras,
        "columns were not tried with images": versions.takes_images(model),
        f"weights of width {width} would get {columns} columns for --max-lora-rank": 2 * columns > width,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_config(vllm_config: Any, settings: ServerSettings) -> None:
    """Check vLLM's resolved configuration; raises `invalid_request`, with what to do instead."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    altering = served_model.policy_altering(vllm_config)
    if altering and not settings.allow_policy_altering:
        raise InvalidRequest(
            f"{' and '.join(altering)} make the logprobs differ from the policy's; "
            "leave them out, or accept that with --allow-policy-altering"
        )
    mode = model.logprobs_mode
    if str(getattr(mode, "value", mode)) != "processed_logprobs":
        raise InvalidRequest(
            f"--logprobs-mode {mode}: a learner needs the logprobs that tokens were drawn with; "
            "leave the flag out (processed_logprobs)"
        )
    if unreachable := topology.refusal(parallel, mixture_of_experts=model.is_moe):
        raise InvalidRequest(unreachable)
    if topology.over_hosts(parallel) and topology.node_address(parallel) in ("0.0.0.0", "::"):
        raise InvalidRequest("vLLM found no address by which other hosts reach this one: give it as $VLLM_HOST_IP")
    if settings.deterministic and parallel.data_parallel_size > 1:
        raise InvalidRequest(
            "--deterministic: which of several engines takes a request depends on their load; leave out "
            "--data-parallel-size"
        )
    if settings.share_gpu and topology.workers(parallel) > 1:
        raise InvalidRequest("--share-gpu: the learner is on one GPU; leave out --tensor-parallel-size and the like")
    if settings.merges and (model.quantization or model.use_mla):
        raise InvalidRequest(
            "--apply merge writes plain weights, and this model computes with others made of them (quantized, or MLA): "
            "use --apply adapter"
        )
    if not settings.merges and (missing := versions.without_lora(model)):
        raise InvalidRequest(missing)
    if missing := versions.without_kernel(model):
        raise InvalidRequest(missing)
    lora = vllm_config.lora_config
    if settings.in_columns and lora.lora_dtype != model.dtype:
        raise InvalidRequest(f"--lora-dtype {lora.lora_dtype}: columns have the weights' dtype; leave it out")
    if unseen := vision.refusal(model):
        raise InvalidRequest(unseen)
