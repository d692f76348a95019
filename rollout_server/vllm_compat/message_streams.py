"""Streams of vLLM's `/v1/messages` that end early, with an error as clients of Anthropic read it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ERROR = 'data: {"error":'


def end_with_errors(state: Any) -> None:
    """Let the streams of `init_openai_state` pass the errors on that end them (0.26 to 0.33).

    vLLM makes them of chunks of a chat, takes an error for a malformed one, and logs that.
    """
    serving = getattr(state, "anthropic_serving_messages", None)
    if serving is None:
        return
    convert = serving.message_stream_converter

    async def converted(chunks: AsyncGenerator[str, None], *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        errors: list[str] = []

        async def before_an_error() -> AsyncIterator[str]:
            async for chunk in chunks:
                if chunk.startswith(_ERROR):
                    errors.append(chunk)
                elif not errors:
                    yield chunk

        async for event in convert(before_an_error(), *args, **kwargs):
            yield event
        for chunk in errors:
            yield _event(json.loads(chunk.removeprefix("data:"))["error"])

    serving.message_stream_converter = converted


def _event(error: dict[str, Any]) -> str:
    """Return the event of an error as vLLM's routes of OpenAI have it."""
    status = int(error.get("code") or 500)
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    body = {"type": "error", "error": {"type": kind, "message": error["message"]}}
    return f"event: error\ndata: {json.dumps(body)}\n\n"
