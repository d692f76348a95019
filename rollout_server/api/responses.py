"""Error responses, and responses that come line by line."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from shared.errors import InternalError, LockstepError
from shared.wire import NDJSON_TYPE

logger = logging.getLogger("lockstep.api")


def error_response(error: LockstepError, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the JSON response for `error`."""
    return JSONResponse(error.body().model_dump(mode="json"), status_code=error.status, headers=headers)


def unforeseen(error: Exception) -> InternalError:
    """Return the error for what nobody has caught."""
    return InternalError(f"the server failed ({type(error).__name__}: {error}); its log has the traceback")


class Ndjson(StreamingResponse):
    """Lines of JSON; an error that comes after the first one is the last one. An empty first line is not sent.

    Example:
        return await Ndjson.begin(lines)
    """

    def __init__(self, first: bytes, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(self._body(first, lines), media_type=NDJSON_TYPE)
        self._lines = lines

    @classmethod
    async def begin(cls, lines: AsyncGenerator[bytes, None]) -> Self:
        """Wait for the first line, so that an error before it is raised here and becomes a response of its own."""
        return cls(await anext(lines), lines)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()  # a client may be gone before `_body` has begun

    @staticmethod
    async def _body(first: bytes, lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(lines):
            try:
                if first:
                    yield first + b"\n"
                async for line in lines:
                    yield line + b"\n"
            except LockstepError as error:
                yield error.body().model_dump_json().encode() + b"\n"
            except Exception as error:
                logger.exception("a response failed after its first line")
                yield unforeseen(error).body().model_dump_json().encode() + b"\n"
