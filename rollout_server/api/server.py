"""uvicorn with bounds on connections, and without its habit of killing the process with the signal that stopped it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn

from rollout_server.api.connections import Connection, Connections, Listener, listen

logger = logging.getLogger("lockstep.api")

#: An idle connection must be closed by the client, or a request may be on its way into one that the server just closed.
#: uvicorn's default is 5 s; httpx keeps one for 5 s, too, the learner for 45 s.
_KEEP_ALIVE_SECONDS = 75
_CONNECTIONS = 4096
_TICKS_IN_A_SECOND = 10


class HttpServer(uvicorn.Server):
    """HTTP server whose first SIGTERM or SIGINT calls `on_signal`, and whose second one ends everything at once.

    `serve` returns then: the engine has to be shut down after it.

    Args:
        on_signal: the default stops the server.
        connections: bounds on connections, and how many there may be.
    """

    def __init__(
        self,
        app: Any,
        on_signal: Callable[[], None] | None = None,
        connections: Connections | None = None,
        **options: Any,
    ) -> None:
        self.connections = Connections(_CONNECTIONS) if connections is None else connections
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", ws="none", access_log=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, **options
            )
        )
        self._on_signal = on_signal or self.stop
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; raises `invalid_request` if that is not possible."""
        config = self.config
        opened = sockets or listen(config.host, config.port)
        connection = partial(
            Connection,
            self.connections,
            config=config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )
        listeners: list[Any] = [Listener(one, self.connections, connection, config.ssl) for one in opened]
        self.servers = listeners
        self.started = True
        for one in opened:
            host, port = one.getsockname()[:2]
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            logger.info("listening on %s://%s", "https" if config.ssl else "http", where)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_IN_A_SECOND == 0:
            self.connections.tick()
        return await super().on_tick(counter)

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
