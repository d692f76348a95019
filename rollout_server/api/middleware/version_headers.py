"""Version headers of vLLM's OpenAI routes: the version of a response, and the version that a request insists on.

vLLM's routes know nothing of versions, and begin a streamed response before they ask the engine for anything; that of
`/v1/responses` has its first events by then. So every response is held back until `EngineProxy` has admitted or refused
the request, or the response is complete. What is refused has an error response then, also where a stream was asked for.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from rollout_server.api.responses import error_response
from rollout_server.api.security.roles import SESSION_KEY
from rollout_server.engine.proxy import CALL_CONTEXT, CallContext
from shared.errors import InvalidRequest, LockstepError
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
        call, held, begun = CallContext(session=scope.get(SESSION_KEY)), list[Message](), False
        wanted = Headers(scope=scope).get(POLICY_HEADER)
        try:
            call.wanted = None if wanted is None else WeightVersion.parse(wanted)
        except ValueError as error:
            await error_response(InvalidRequest(f"{POLICY_HEADER}: {error}"))(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if begun:
                if not held:
                    await send(message)
                return
            held.append(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            # A GET samples nothing: its stream is of a response that runs already.
            known = bool(call.versions) or refusal() is not None or scope["method"] != "POST"
            if complete or (len(held) > 1 and known):
                await begin()

        def refusal() -> LockstepError | None:
            says_so = bool(held) and held[0].get("status", 200) >= 400
            return call.refusal or (None if says_so else call.rejection)

        async def begin() -> None:
            nonlocal begun
            begun = True
            if (refused := refusal()) is not None:  # `held` is never sent
                await error_response(refused)(scope, receive, send)
                return
            if call.versions:
                MutableHeaders(scope=held[0])[VERSION_HEADER] = ", ".join(call.versions)
            for message in held:
                await send(message)
            held.clear()

        token = CALL_CONTEXT.set(call)
        try:
            await self._app(scope, receive, answer)
            if held and not begun:
                await begin()
        except Exception:
            if refusal() is None or (begun and not held):
                raise
            if not begun:
                await begin()
        finally:
            CALL_CONTEXT.reset(token)
