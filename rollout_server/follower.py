"""A host of an engine beside the head (`--node-rank` above 0): its workers, without HTTP, until the head ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

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
    working = _Working(asyncio.ensure_future(link.ended()), meeting.head)
    try:
        await working.until_an_end(vllm_config, lifecycle.links_secret(token))
    except EngineDead as error:
        reason = error.message
        raise
    finally:
        await link.leave(reason)  # before the head notices that a worker has ended
        await working.stop()


class _Working:
    """Workers of this host, which end with the head.

    Args:
        ended: done when the head, which listens at `head`, has ended.
    """

    def __init__(self, ended: asyncio.Future[None], head: str) -> None:
        self._ended, self._head = ended, head
        self._thread: asyncio.Future[Any] | None = None

    async def until_an_end(self, vllm_config: Any, secret: bytes) -> NoReturn:
        """Load the model, run, and raise `engine_dead` when a worker or the head has ended."""
        os.environ[tcp.VARIABLE] = secret.hex()
        with start_errors.reported_errors() as first_report:
            try:
                executor = await self._on_thread(hosts_executor.load, vllm_config)
            except EngineDead:
                raise
            except Exception as error:
                raise EngineDead(f"vLLM could not start the workers: {first_report() or one_line(error)}") from error
        logger.info("the model is loaded; the head says when it is ready")
        raise EngineDead(await self._on_thread(hosts_executor.first_to_end, executor))

    async def _on_thread(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Run a function that returns when something has ended, or raises; the head's end comes before its result."""
        self._thread = asyncio.ensure_future(asyncio.to_thread(function, argument))
        await asyncio.wait((self._thread, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if not self._ended.done() and (self._thread.exception() or isinstance(self._thread.result(), str)):
            await asyncio.wait((self._ended,), timeout=_HEAD_S)  # a worker may be the first to notice
        if self._ended.done():
            raise EngineDead(f"the head ({self._head}) has ended, and this host's workers with it")
        return self._thread.result()

    async def stop(self) -> None:
        """End the workers, whatever they are doing."""
        self._ended.cancel()
        os.environ.pop(tcp.VARIABLE, None)
        if self._thread is not None:
            await _end_workers(self._thread)


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
