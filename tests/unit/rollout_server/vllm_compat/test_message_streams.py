"""Streams of vLLM's real converter that an error ends."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.vllm_compat import message_streams

_CHUNK = {
    "id": "a",
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "so"}, "finish_reason": None}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


@pytest.fixture
def serving() -> Any:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    serving = AnthropicServingMessages.__new__(AnthropicServingMessages)
    message_streams.end_with_errors(SimpleNamespace(anthropic_serving_messages=serving))
    return serving


async def _events(serving: Any, *chunks: dict[str, Any]) -> list[str]:
    async def stream() -> Any:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    return [event async for event in serving.message_stream_converter(stream())]


@pytest.mark.parametrize(
    ("code", "kind"), [(410, "invalid_request_error"), (429, "rate_limit_error"), (500, "api_error")]
)
async def test_a_stream_that_an_error_ends(serving: Any, code: int, kind: str, caplog) -> None:
    error = {"message": "it has been deleted", "type": "Gone", "param": None, "code": code}
    with caplog.at_level(logging.WARNING):
        *begun, last = await _events(serving, _CHUNK, _CHUNK, {"error": error})
    assert begun[0].startswith("event: message_start")
    assert last.startswith("event: error\ndata: ")
    body = json.loads(last.partition("data: ")[2])
    assert body == {"type": "error", "error": {"type": kind, "message": "it has been deleted"}}
    assert not caplog.records


async def test_a_stream_without_an_error_is_vllms(serving: Any) -> None:
    events = await _events(serving, _CHUNK, _CHUNK)
    assert events[-1].startswith("event: message_stop")


def test_a_model_without_the_route() -> None:
    message_streams.end_with_errors(SimpleNamespace())
