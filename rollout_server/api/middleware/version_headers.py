"""Version headers of vLLM's OpenAI routes: the version of a response, and the version that a request insists on.

vLLM's routes know nothing of versions, and begin a streamed response before they ask the engine for anything; that of
`/v1/responses` has its first events by then. So every response is held back until `EngineProxy` has admitted or refused
the request, or the response is complete. What is refused has an error response then, also where a stream was asked for.
A stream of events that a route breaks off later ends with an event of the error.
"""

from __future__ import annotations

import json

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from rollout_server.api.responses import error_response
from rollout_server.api.security.roles import SESSION_KEY
from rollout_server.engine.proxy import CALL_CONTEXT, CallContext
from rollout_server.vllm_compat import versions
from shared.errors import InternalError, InvalidRequest, LockstepError
from shared.messages import one_line
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
        events = False  # a stream of them has begun, and not ended
        wanted = Headers(scope=scope).get(POLICY_HEADER)
        try:
            call.wanted = None if wanted is None else WeightVersion.parse(wanted)
        except ValueError as error:
            await error_response(InvalidRequest(f"{POLICY_HEADER}: {error}"))(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            nonlocal events
            complete = _ends(message)
            if begun:
                events = events and not complete
                if not held:
                    await send(message)
                return
            held.append(message)
            # A GET samples nothing: its stream is of a response that runs already.
            known = bool(call.versions) or refusal() is not None or scope["method"] != "POST"
            if complete or (len(held) > 1 and known):
                await begin()

        def refusal() -> LockstepError | None:
            says_so = bool(held) and held[0].get("status", 200) >= 400
            return call.refusal or (None if says_so else call.rejection)

        async def begin() -> None:
            nonlocal begun, events
            begun = True
            if (refused := refusal()) is not None:  # `held` is never sent
                await error_response(refused)(scope, receive, send)
                return
            if call.versions:
                MutableHeaders(scope=held[0])[VERSION_HEADER] = ", ".join(call.versions)
            kind = Headers(scope=held[0]).get("content-type", "")
            events = kind.startswith("text/event-stream") and not _ends(held[-1])
            for message in held:
                await send(message)
            held.clear()

        token = CALL_CONTEXT.set(call)
        try:
            await self._app(scope, receive, answer)
            if held and not begun:
                await begin()
        except Exception as error:
            # Starlette's error where a route has begun an answer before it refuses the request.
            if isinstance(error.__cause__, versions.own_refusals()):
                call.rejection = call.rejection or InvalidRequest(one_line(error.__cause__))
            refused = refusal()
            if refused is None or (begun and not held and not events):
                raise
            if not begun:
                await begin()
            elif events:  # nothing of its route's own comes any more
                await send({"type": "http.response.body", "body": _event(refused)})
            if isinstance(refused, InternalError):
                raise  # for the log
        finally:
            CALL_CONTEXT.reset(token)


def _ends(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _event(error: LockstepError) -> bytes:
    """Return the event that ends a stream early, which clients of OpenAI and of Anthropic take for an error."""
    body = {"type": "error", **error.body().model_dump(mode="json")}
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()
