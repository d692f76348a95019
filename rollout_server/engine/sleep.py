"""`--share-gpu`: the engine sleeps while a learner trains on its GPU, and is awake while it serves or takes a push."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, nullcontext

from rollout_server.engine.proxy import EngineProxy
from rollout_server.ipc.client import Workers
from shared.errors import EngineDead, InvalidRequest

logger = logging.getLogger("lockstep.engine")

#: Weights go to host memory and back.
_MOVE_SECONDS = 300.0


class Sleep:
    """Puts the engine to sleep and wakes it, one after the other, and never during a push.

    Requests that run or arrive meanwhile wait, whatever their route, and go on when the engine wakes: they compute
    their KV again and keep their versions.

    Args:
        level: vLLM's: 1 moves the weights to host memory and gives up the KV cache; 0, for CPUs, only holds requests.
    """

    def __init__(self, proxy: EngineProxy, workers: Workers, *, enabled: bool, level: int = 1) -> None:
        self._proxy, self._workers, self._enabled, self._level = proxy, workers, enabled, level
        self._lock = asyncio.Lock()
        self._given_back: list[int] = []  # bytes, of each worker's GPU

    async def fall_asleep(self) -> None:
        """Give the GPU's memory back, after a push that is under way; no effect if it sleeps already.

        Raises:
            LockstepError: `invalid_request` without --share-gpu, `install_failed` if a worker is still writing for a
                failed push; `engine_dead`.
        """
        self._check_enabled()
        async with self._lock:
            if not self._proxy.asleep:
                before = await self._free()
                self._given_back = [0] * len(before)
                await self._moved(self._proxy.put_to_sleep(self._level), "fall asleep")
                self._given_back = [free - old for old, free in zip(before, await self._free(), strict=True)]

    async def rehearse(self) -> None:
        """Sleep and wake once, before anyone waits for it: pinning host memory for the weights takes seconds.

        PyTorch keeps that memory for later sleeps. If a learner has taken the GPU meanwhile, it sleeps on and is awake
        when that one yields.

        Raises:
            LockstepError: `engine_dead`.
        """
        if self._enabled and self._level:
            await self.fall_asleep()
            try:
                await self.wake()
            except InvalidRequest as error:
                logger.warning(error.message)

    async def wake(self) -> None:
        """Take the memory again and go on; no effect if it is awake.

        Raises:
            LockstepError: `invalid_request` without --share-gpu, or while others hold the memory: it sleeps on then;
                `engine_dead`.
        """
        self._check_enabled()
        async with self._lock:
            await self._wake()

    @asynccontextmanager
    async def kept_awake(self) -> AsyncIterator[None]:
        """Keep the engine awake in this block, which writes to its weights."""
        async with self._lock if self._enabled else nullcontext():
            await self._wake()
            yield

    async def _wake(self) -> None:
        if not self._proxy.asleep:
            return
        for free, needed in zip(await self._free(), self._given_back, strict=True):
            if free < needed:
                raise InvalidRequest(
                    f"the server sleeps on: it needs {needed / 2**30:.1f} GiB of its GPU, and others have left "
                    f"{free / 2**30:.1f}. Lower its --gpu-memory-utilization until it fits beside the learner"
                )
        await self._moved(self._proxy.wake(self._level), "wake up")

    async def _free(self) -> list[int]:
        """Return the free bytes of each worker's GPU, once none is writing any more; nothing on CPUs."""
        answers = await self._workers.call("free_memory", _MOVE_SECONDS)
        return [answer["free"] for answer in answers if answer["free"] is not None]

    async def _moved(self, move: Awaitable[None], what: str) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(_MOVE_SECONDS):
                await move
        except BaseException as error:  # half of its memory may be there
            reason = EngineDead(f"the engine did not {what}: {type(error).__name__} {error}".rstrip())
            self._proxy.give_up(reason)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise reason from error
        logger.info("%s after %.2f s", "asleep" if self._proxy.asleep else "awake", time.monotonic() - started)

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise InvalidRequest("this server has its GPU to itself: start it with --share-gpu to let it sleep")
