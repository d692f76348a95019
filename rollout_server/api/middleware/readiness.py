"""Around the app, inside the guard: answers `/health` and `/ready` while the model loads, then lets requests in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.errors import EngineDead, NotReady


class ReadinessMiddleware:
    """ASGI app that becomes the real one when it is ready."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._lifespan: Any = None
        self._closers: list[Callable[[], None]] = []
        self.healthy: Callable[[], bool] = lambda: True
        self.ready: Callable[[], bool] = lambda: True

    def open(
        self, app: ASGIApp, healthy: Callable[[], bool] = lambda: True, ready: Callable[[], bool] = lambda: True
    ) -> None:
        """From now on `app` answers. `healthy`: is the engine behind it alive? `ready`: does it take new requests?"""
        self._app = app
        self.healthy, self.ready = healthy, ready

    def on_close(self, closer: Callable[[], None]) -> None:
        """Run `closer` when the server goes down, last registered first."""
        self._closers.append(closer)

    def close(self) -> None:
        """Stop answering for good and release what was registered."""
        self._app = None
        while self._closers:
            self._closers.pop()()

    @property
    def is_open(self) -> bool:
        """Has the model been loaded and warmed up?"""
        return self._app is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ("/health", "/ready"):
            ok = self.healthy() and (scope["path"] == "/health" or (self.is_open and self.ready()))
            await Response(status_code=200 if ok else 503)(scope, receive, send)
        elif self._app is not None and self.healthy():
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = NotReady("the model is still being loaded; wait until /ready answers 200")
            if not self.healthy():
                error = EngineDead("the engine has died; this server is about to stop")
            headers = {"Retry-After": "5"}
            response = JSONResponse(error.body().model_dump(), status_code=error.status, headers=headers)
            await response(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})
