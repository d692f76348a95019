"""uvicorn without its habit of killing the process with the signal that stopped it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn


class _Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT like uvicorn, then returns: the engine has to be shut down after it.

    `on_signal`, if given, decides what the first of them does. A second one ends everything at once.
    """

    on_signal: Callable[[], None] | None = None
    _signalled = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._signalled:
            self.should_exit = self.force_exit = True
        elif self.on_signal is not None:
            self.on_signal()
        else:
            self.should_exit = True
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


#: An idle connection must be closed by the client, or a request may be on its way into one that the server just closed.
#: uvicorn's default is 5 s, and so is the time for which httpx keeps one.
_KEEP_ALIVE_SECONDS = 75


def make_server(app: Any, on_signal: Callable[[], None] | None = None, **options: Any) -> uvicorn.Server:
    """A uvicorn server for `app`; `options` are those of `uvicorn.Config`."""
    config = uvicorn.Config(app, lifespan="off", access_log=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, **options)
    server = _Server(config)
    server.on_signal = on_signal
    return server
