"""Calls of tools that a model has written, through vLLM's real models and converter."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.vllm_compat import tool_calls


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.tool_parsers import hermes_tool_parser as parser

    for kind in (parser.FunctionCall, parser.DeltaFunctionCall):
        monkeypatch.setattr(kind, "__init__", kind.__init__)  # restored at the end
    serving = AnthropicServingMessages.__new__(AnthropicServingMessages)
    tool_calls.answer_all(SimpleNamespace(anthropic_serving_messages=serving))
    return serving


def _answer(serving: Any, *arguments: str, content: str | None = None, finish_reason: str = "tool_calls") -> Any:
    """Return the body of `/v1/messages` for calls with these arguments."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    calls = [{"id": "c", "function": {"name": "add", "arguments": each}} for each in arguments]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    chat = ChatCompletionResponse(
        model="m",
        choices=[{"index": 0, "message": message, "finish_reason": finish_reason}],
        usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    )
    body = serving.messages_full_converter(chat).model_dump(exclude_none=True)
    json.dumps(body, allow_nan=False).encode()  # as it is sent
    return body


@pytest.mark.parametrize("written", ['"x"', "[1]", "null", "1e999", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 2000])
def test_arguments_that_are_no_object_stay_text(serving: Any, written: str) -> None:
    body = _answer(serving, written, content="so")
    assert [block["type"] for block in body["content"]] == ["text"]
    assert body["content"][0]["text"] == f'so{{"name": "add", "arguments": {written}}}'
    assert body["stop_reason"] == "end_turn"


def test_calls_beside_them_are_calls(serving: Any) -> None:
    body = _answer(serving, '{"a": 3}', '"x"')
    text, call = body["content"]
    assert text["text"] == '{"name": "add", "arguments": "x"}'
    assert call["input"] == {"a": 3}
    assert body["stop_reason"] == "tool_use"


def test_what_was_cut_was_cut(serving: Any) -> None:
    assert _answer(serving, "3", finish_reason="length")["stop_reason"] == "max_tokens"


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("kind", ["FunctionCall", "DeltaFunctionCall"])
def test_half_a_character_is_sent_as_it_was_written(kind: str) -> None:
    from vllm.tool_parsers import hermes_tool_parser as parser

    # As parsers of vLLM make them, of JSON that they have read.
    arguments = json.dumps(json.loads('{"a": "\\ud83dé😀"}'), ensure_ascii=False)
    call = getattr(parser, kind)(name="n\ud800", arguments=arguments)
    assert json.loads(call.model_dump_json()) == {"name": "n\\ud800", "arguments": '{"a": "\\ud83dé😀"}'}


def test_a_model_without_the_route() -> None:
    tool_calls.answer_all(SimpleNamespace())
