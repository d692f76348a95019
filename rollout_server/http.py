"""uvicorn without its habit of killing the process with the signal that stopped it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import uvicorn


class _Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT like uvicorn, then returns: the engine has to be shut down after it."""

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


def make_server(app: Any, **options: Any) -> uvicorn.Server:
    """A uvicorn server for `app`; `options` are those of `uvicorn.Config`."""
    return _Server(uvicorn.Config(app, lifespan="off", access_log=False, **options))
