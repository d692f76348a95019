"""Calls of tools in a form that can be sent, whatever the model has written.

vLLM would answer 400 as if the client's request were wrong, and an agent would lose the episode that taught something.
"""

from __future__ import annotations

import json
from typing import Any


def answer_all(state: Any) -> None:
    """Let the routes of `init_openai_state` answer with any call that a model writes (0.26 to 0.33)."""
    from vllm.tool_parsers import hermes_tool_parser as parser  # has both classes in all versions

    for kind in (parser.FunctionCall, parser.DeltaFunctionCall):
        _escape_halves(kind)
    serving = getattr(state, "anthropic_serving_messages", None)
    if serving is None:
        return
    convert = serving.messages_full_converter

    def converted(answer: Any) -> Any:
        for choice in answer.choices:
            _leave_as_text(choice)
        return convert(answer)

    serving.messages_full_converter = converted


def _escape_halves(kind: Any) -> None:
    """Let names and arguments hold half a character (a lone surrogate) as JSON writes it: UTF-8 has none."""
    init = kind.__init__

    def escaped(self: Any, **fields: Any) -> None:
        init(self, **{name: _escaped(value) if isinstance(value, str) else value for name, value in fields.items()})

    kind.__init__ = escaped


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _leave_as_text(choice: Any) -> None:
    """Turn calls whose arguments are no object, which `tool_use` of Anthropic cannot hold, into text."""
    message = choice.message
    calls = [call for call in message.tool_calls if _is_object(call.function.arguments)]
    texts = [
        f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments}}}'
        for call in message.tool_calls
        if call not in calls
    ]
    message.content = "".join([message.content or "", *texts]) or None
    message.tool_calls = calls
    if texts and not calls and choice.finish_reason == "tool_calls":
        choice.finish_reason = "stop"


def _is_object(arguments: str) -> bool:
    """Return whether arguments are an object, of values that can be sent as JSON."""
    try:
        parsed = json.loads(arguments)
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict)
