"""The ASGI layer that bounds requests, how many at once and how large, before they are parsed."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.api import metrics
from rollout_server.api.bodies import check_body
from rollout_server.api.responses import error_response
from rollout_server.engine.capacity import BODY_BYTES, Capacity, too_large
from rollout_server.settings import ServerSettings
from shared import wire
from shared.errors import InvalidRequest, LockstepError, Timeout

_BODY_SECONDS = 120.0
#: Let through under any load, and while others wait for their turn: they have no body, and begin no work.
_ORDERS = (wire.DRAIN, wire.SLEEP, wire.WAKE)
_RUNS = wire.RUN.format(run_id="")
#: Ends and rewards of sessions: they make room.
_SESSIONS = wire.SESSION.format(session_id="")


class LimitsMiddleware:
    """Lets requests through to `app`, each with its complete body.

    Pushes, and ends of sessions, are let through under any load: a learner must be able to go on. Adapters are streamed
    past it; they have `--max-adapter-mib`, and a deadline of their own.

    Args:
        context: tokens of the model's context.
        tool_server: vLLM has one, which runs hosted tools.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        capacity: Capacity,
        context: int = 0,
        *,
        tool_server: bool = False,
    ) -> None:
        self._app, self._settings, self._capacity = app, settings, capacity
        self._check_body = partial(check_body, context=context, tool_server=tool_server)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or scope["path"] in _ORDERS:
            await self._app(scope, receive, send)
            return
        is_push = scope["path"].startswith(_RUNS)
        makes_room = scope["path"].startswith(_SESSIONS)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                metrics.REFUSED.labels(message["status"]).inc()
                MutableHeaders(scope=message).setdefault("Retry-After", "1")
            await send(message)

        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._capacity.request(bounded=not (is_push or makes_room)))
                # Refuse what can be refused before it is read.
                if is_push and scope["method"] != "DELETE":
                    self._capacity.check(0)
                # The handlers of these two count their sequences, which are known once the body has been parsed.
                elif not (is_push or makes_room) and scope["path"] not in (wire.GENERATE, wire.SCORE):
                    self._capacity.check()
                if not (is_push and scope["method"] == "PUT"):
                    buffered = await self._buffer(scope, receive, held)
                    if buffered is None:
                        return
                    receive = buffered
            except LockstepError as error:
                await error_response(error)(scope, receive, answer)
                return
            await self._app(scope, receive, answer)

    async def _buffer(self, scope: Scope, receive: Receive, held: contextlib.ExitStack) -> Receive | None:
        """Read the body; return a `receive` that begins with it, None if the client left. It counts until `held` ends.

        Raises:
            LockstepError: `too_large` as soon as that is known, `timeout`, `overloaded`, `invalid_request`.
        """
        limit = self._settings.max_body_mib * 2**20
        if (encoding := Headers(scope=scope).get("content-encoding", "")).lower() not in ("", "identity"):
            raise InvalidRequest(
                f"Content-Encoding {encoding:.40}: nothing is decompressed here; send the body as it is"
            )
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise too_large(f"{announced[:18]} bytes", "--max-body-mib", self._settings.max_body_mib)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > limit:
                        raise too_large(f"more than {limit} bytes", "--max-body-mib", self._settings.max_body_mib)
                    self._capacity.hold(len(chunk))
                    body += chunk
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Timeout(f"the request's body did not arrive within {_BODY_SECONDS:g} s") from None
        finally:
            held.callback(self._capacity.hold, -len(body))
        left = [bytes(body)]
        memory = await self._check_body(scope, left[0]) - len(body)
        self._capacity.hold(memory)
        held.callback(self._capacity.hold, -memory)
        BODY_BYTES.set(memory + len(left[0]))

        async def again() -> Message:
            if left:
                return {"type": "http.request", "body": left.pop(), "more_body": False}
            return await receive()

        return again
