"""Watchdog for an engine that lives but makes no progress."""

from __future__ import annotations

import time

from rollout_server.engine.admission import OutputTokens
from rollout_server.engine.proxy import EngineProxy
from shared.errors import EngineDead

_LOOKS = 30  # within the limit; each walks over all requests


class StallWatchdog:
    """Gives up an engine that has requests and, for `limit` seconds, no new token for any of them; 0: never.

    Half-way it asks for a token itself: requests that cannot begin, because their structured outputs are still being
    compiled, say nothing about the engine. `sampling` is False where that token would change the batches of others:
    then the engine only has to answer between two steps.
    """

    def __init__(self, proxy: EngineProxy, limit: float, *, sampling: bool = True) -> None:
        self._proxy, self._limit, self._interval = proxy, limit, min(limit / _LOOKS, 10.0)
        self._sampling = sampling
        self._looked = time.monotonic()
        self._stalled = 0.0
        self._outputs = 0
        self._tokens: OutputTokens = {}

    def look(self) -> None:
        """Check for progress; to be called once a second or so."""
        now = time.monotonic()
        passed = now - self._looked
        if not self._limit or passed < self._interval:
            return
        self._looked = now
        # A process that was stopped itself, and finds an hour gone, has seen none of it.
        self._stalled += min(passed, 2 * self._interval + 2.0)
        if self._progressed():
            self._stalled = 0.0
        elif self._stalled <= self._limit:
            if self._stalled > self._limit / 2:
                self._proxy.probe(sampling=self._sampling)
        else:
            self._proxy.give_up(
                EngineDead(
                    f"{len(self._tokens)} sequences are running and none has got a token for {self._stalled:.0f} s "
                    "(--engine-stall-seconds): the engine hangs"
                )
            )

    def _progressed(self) -> bool:
        """Return whether there is a new token, or no request that should have got one since the last look."""
        proxy, before, outputs = self._proxy, self._tokens, self._outputs
        self._tokens, self._outputs = proxy.output_tokens(), proxy.outputs
        if proxy.held or not self._tokens or not before or outputs != self._outputs:
            return True
        return any(tokens > before.get(output, 0) for output, tokens in self._tokens.items())
