"""A host of an engine beside the head (`--node-rank` above 0): its workers, without HTTP, until the head ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from typing import Any

from rollout_server import lifecycle
from rollout_server.ipc import tcp
from rollout_server.ipc.hosts import Follower
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import hosts_executor, start_errors, topology
from shared.errors import EngineDead
from shared.messages import one_line

#: For a worker to end by itself once it is asked to, and for the head's end to be seen after a worker's own.
_LEAVE_S, _HEAD_S = 3.0, 1.0

logger = logging.getLogger("lockstep.follower")


async def follow(vllm_config: Any, settings: ServerSettings, token: str) -> int:
    """Run this host's workers until SIGTERM or SIGINT, and return the process's exit status then.

    Args:
        token: that all hosts of the engine were given.

    Raises:
        EngineDead: the head, or a worker of this host, has ended or never come.
        InvalidRequest: the head has refused this host, for its flags.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    running = asyncio.ensure_future(_follow(vllm_config, settings, token))
    stopping = asyncio.ensure_future(stopped.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        stopping.cancel()
        running.result()
    logger.info("asked to end: the engine ends with this host")
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return 0


async def _follow(vllm_config: Any, settings: ServerSettings, token: str) -> None:
    parallel = vllm_config.parallel_config
    meeting = await asyncio.to_thread(lifecycle.meeting, vllm_config, settings, token)
    address, rank = topology.node_address(parallel), parallel.node_rank
    workers = topology.workers_of(parallel, rank)
    logger.info(
        "host %d of %d (%s) runs %s of the engine whose head is at %s: it serves no HTTP, and ends with the head, for "
        "which it waits up to %.0f s",
        rank,
        meeting.nodes,
        address,
        workers,
        meeting.head,
        meeting.timeout,
    )
    link = await Follower.join(meeting, rank, address, workers)
    logger.info("all %d hosts of the engine have come; loading the model", meeting.nodes)
    reason = "it was asked to end"
    ended = asyncio.ensure_future(link.ended())
    try:
        await _work(vllm_config, lifecycle.links_secret(parallel, token), ended, meeting.head)
    except EngineDead as error:
        reason = error.message
        raise
    finally:
        ended.cancel()
        await link.leave(reason)


async def _work(vllm_config: Any, secret: bytes, ended: asyncio.Future[None], head: str) -> None:
    """Run the workers; raises `engine_dead` when one of them, or the head, has ended."""

    async def until_ended(work: asyncio.Future[Any]) -> Any:
        await asyncio.wait((work, ended), return_when=asyncio.FIRST_COMPLETED)
        if work.done() and (work.exception() or isinstance(work.result(), str)):
            await asyncio.wait((ended,), timeout=_HEAD_S)  # a worker may be the first to notice
        if ended.done():
            raise EngineDead(f"the head ({head}) has ended, and this host's workers with it")
        return work.result()

    os.environ[tcp.VARIABLE] = secret.hex()
    work = asyncio.ensure_future(asyncio.to_thread(hosts_executor.load, vllm_config))
    try:
        with start_errors.reported_errors() as first_report:
            try:
                executor = await until_ended(work)
            except EngineDead:
                raise
            except Exception as error:
                raise EngineDead(f"vLLM could not start the workers: {first_report() or one_line(error)}") from error
        logger.info("the model is loaded; its head says when it is ready")
        work = asyncio.ensure_future(asyncio.to_thread(hosts_executor.first_to_end, executor))
        raise EngineDead(await until_ended(work))
    finally:
        os.environ.pop(tcp.VARIABLE, None)
        await _end_workers(work)


async def _end_workers(work: asyncio.Future[Any]) -> None:
    """End this host's workers, and what runs for them here."""
    deadline = time.monotonic() + _LEAVE_S
    for process in multiprocessing.active_children():
        process.terminate()
    while not work.done():
        await asyncio.wait((work,), timeout=0.1)
        if time.monotonic() > deadline:  # stuck in a collective call, say, or only just started
            for process in multiprocessing.active_children():
                process.kill()
    work.exception()  # or it would be said again
    for process in multiprocessing.active_children():
        process.kill()
        process.join(_LEAVE_S)
