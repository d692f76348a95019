"""`--deterministic`: one request at a time, admitted at once, so that the engine forms the same batches every time.

The rounding of a matrix product depends on its batch. Equal seeds give equal tokens and logprobs only if every step of
the engine has the same batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from rollout_server.engine.proxy import EngineProxy
from shared.errors import EngineDead


class Exclusive:
    """Exclusive use of the engine by one request; no effect unless `enabled`."""

    def __init__(self, proxy: EngineProxy, *, enabled: bool) -> None:
        self._proxy = proxy
        self._lock = asyncio.Lock() if enabled else None

    async def take(self) -> Callable[[], None]:
        """Wait until no other request has the engine; return a function that releases it, to be called once."""
        if self._lock is None:
            return lambda: None
        await self._lock.acquire()
        return self._lock.release

    @asynccontextmanager
    async def together(self, submitted: Callable[[set[str]], Iterable[bool]]) -> AsyncIterator[None]:
        """Let the engine see all requests that are made in this block at once.

        Args:
            submitted: for each of these requests whether it is among the given ids (or has failed).
        """
        if self._lock is None:
            yield
            return
        try:
            async with self._proxy.paused(clear_cache=False):
                yield
                while not all(submitted(self._proxy.running())):  # noqa: ASYNC110 - vLLM has no event for it
                    await asyncio.sleep(0.002)
        except TimeoutError:
            error = EngineDead("the engine hangs: it did not pause between two steps")
            self._proxy.give_up(error)
            raise error from None
