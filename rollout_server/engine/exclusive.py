"""`--deterministic`: one request at a time, admitted as a whole, so that the engine forms the same batches every time.

What a matrix product rounds to depends on the batch it is computed in. Equal seeds give equal tokens and logprobs only
if requests meet the same company at every step of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from rollout_server.engine.proxy import EngineProxy
from shared.errors import EngineDead

_POLL_SECONDS = 0.002


class Exclusive:
    """Whose turn it is; on a server that is not deterministic everyone's, always."""

    def __init__(self, proxy: EngineProxy, *, enabled: bool) -> None:
        self._proxy = proxy
        self._lock = asyncio.Lock() if enabled else None

    async def take(self) -> Callable[[], None]:
        """Wait for a turn; answers what gives it back, and may be called twice."""
        lock = self._lock
        if lock is None:
            return lambda: None
        await lock.acquire()
        held = [lock]

        def give_back() -> None:
            if held:
                held.pop().release()

        return give_back

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
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            error = EngineDead("the engine hangs: it did not pause between two steps")
            self._proxy.give_up(error)
            raise error from None
