"""uvicorn without its habit of killing the process with the signal that stopped it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

#: An idle connection must be closed by the client, or a request may be on its way into one that the server just closed.
#: uvicorn's default is 5 s, and so is the time for which httpx keeps one.
_KEEP_ALIVE_SECONDS = 75


class HttpServer(uvicorn.Server):
    """HTTP server whose first SIGTERM or SIGINT calls `on_signal`, and whose second one ends everything at once.

    `serve` returns then: the engine has to be shut down after it.

    Args:
        on_signal: the default stops the server.
    """

    def __init__(self, app: Any, on_signal: Callable[[], None] | None = None, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(app, lifespan="off", access_log=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, **options)
        )
        self._on_signal = on_signal or self.stop
        self._signalled = False

    def stop(self) -> None:
        """Stop as soon as what is under way has been answered."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._signalled:
            self.should_exit = self.force_exit = True
        else:
            self._on_signal()
        self._signalled = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
