"""Answers that come line by line, and give back what they hold however they end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class Ndjson(StreamingResponse):
    """`at_end` is called once the answer has ended, also when no line of it was ever asked for: a client may be gone
    before the first one, and then `lines` never begins.
    """

    def __init__(self, lines: AsyncIterator[bytes], at_end: Callable[[], Awaitable[None] | None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            ended = self._at_end()
            if ended is not None:
                await ended
