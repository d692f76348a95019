"""Version headers of vLLM's OpenAI routes: the version of a response, and the version that a request insists on.

vLLM's routes know nothing of versions, and begin a streamed response before they ask the engine for anything. So the
start of every response is held back until its first bytes: by then `EngineProxy` has admitted or refused the request.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from rollout_server.api.responses import error_response
from rollout_server.api.security.roles import SESSION_KEY
from rollout_server.engine.proxy import CALL_CONTEXT, CallContext
from shared.errors import InvalidRequest
from shared.weights import WeightVersion
from shared.wire import POLICY_HEADER, VERSION_HEADER


class VersionHeaderMiddleware:
    """The ASGI layer around vLLM's app; `routes` are those of the app."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.routes = app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call, start, refused = CallContext(session=scope.get(SESSION_KEY)), None, False
        wanted = Headers(scope=scope).get(POLICY_HEADER)
        try:
            call.wanted = None if wanted is None else WeightVersion.parse(wanted)
        except ValueError as error:
            await error_response(InvalidRequest(f"{POLICY_HEADER}: {error}"))(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            nonlocal start, refused
            if refused:
                return
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                if call.refusal is not None:
                    refused = True
                    await error_response(call.refusal)(scope, receive, send)
                    return
                if call.versions:
                    MutableHeaders(scope=start)[VERSION_HEADER] = ", ".join(call.versions)
                await send(start)
                start = None
            await send(message)

        token = CALL_CONTEXT.set(call)
        try:
            await self._app(scope, receive, answer)
        finally:
            CALL_CONTEXT.reset(token)
