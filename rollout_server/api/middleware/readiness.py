"""Inside `AuthMiddleware`: `/health` and `/ready` from the start, everything else once the model is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.api.responses import error_response
from rollout_server.api.security.roles import OPEN
from shared import wire
from shared.errors import EngineDead, LockstepError, NotReady


class ReadinessMiddleware:
    """ASGI app that hands requests to the server's own app from `open` to `close`."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._resources = contextlib.ExitStack()
        self._healthy: Callable[[], bool] = lambda: True
        self._ready: Callable[[], bool] = lambda: True

    def open(
        self, app: ASGIApp, healthy: Callable[[], bool] = lambda: True, ready: Callable[[], bool] = lambda: True
    ) -> None:
        """Let requests through to `app`. `healthy`: is the engine alive? `ready`: does it take new requests?"""
        self._app, self._healthy, self._ready = app, healthy, ready

    def on_close(self, closer: Callable[[], None]) -> None:
        """Run `closer` when the server goes down, last registered first."""
        self._resources.callback(closer)

    def close(self) -> None:
        """Stop serving for good and release what was registered."""
        self._app = None
        self._resources.close()

    @property
    def is_open(self) -> bool:
        """Whether the model has been loaded and warmed up."""
        return self._app is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in OPEN:
            ok = self._healthy() and (scope["path"] == wire.HEALTH or (self.is_open and self._ready()))
            await Response(status_code=200 if ok else 503)(scope, receive, send)
        elif self._app is not None and self._healthy():
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error: LockstepError = EngineDead("the engine has died; this server is about to stop")
            if self._healthy():
                error = NotReady("the model is still being loaded; wait until /ready answers 200")
            await error_response(error, {"Retry-After": "5"})(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})
