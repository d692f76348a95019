"""vLLM's routes take text alone, whatever a medium is called and wherever it is put."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.generation.media import check_text_only
from shared.errors import InvalidRequest

URL = "http://127.0.0.1:1/a.png"


def _user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "document",
    [
        {"messages": [{"role": "user", "content": "text"}], "mm_processor_kwargs": None},
        _user({"type": "text", "text": "a"}, "b"),
        _user({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}),
        {"messages": [{"role": "assistant", "content": None, "audio": None, "refusal": None}]},
        _user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "b"}]}),
        _user({"type": "tool_use", "id": "a", "name": "read", "input": {"file": "a.py", "content": [{"type": "x"}]}}),
        _user({"type": "thinking", "thinking": "a", "signature": "b"}, {"type": "redacted_thinking", "data": "a"}),
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"image": "a"}}}]}]},
        {"messages": [], "tools": [{"type": "function", "function": {"parameters": {"properties": {"file": {}}}}}]},
        {"input": "text", "instructions": "a"},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
        {"input": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]},
        {"input": [{"type": "function_call", "arguments": "{}"}, {"type": "function_call_output", "output": "a"}]},
        {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]}]},
        {"system": [{"type": "text", "text": "a"}], "messages": []},
        {"messages": [], "documents": [{"title": "a", "text": "b", "source": "c"}]},
        {"prompt": [1, 2, 3]},
    ],
)
def test_text_is_taken_in_every_form(document: dict[str, Any]) -> None:
    check_text_only(document)


@pytest.mark.parametrize(
    "document",
    [
        _user({"type": "image_url", "image_url": {"url": URL}}),
        _user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        _user({"type": "image_pil", "image_pil": URL}),
        _user({"type": "image_pil", "image_pil": [URL], "uuid": "a"}),
        _user({"image_pil": "/etc/passwd"}),
        _user({"image_pil": None}),
        _user({"type": "text", "text": "a", "image_pil": "/etc/passwd", "uuid": "a"}),
        _user({"type": "text", "text": "a", "uuid": "a"}),
        _user({"type": "text", "text": "a", "IMAGE_URL": URL}),
        _user({"type": "image", "image": URL}),
        _user({"type": "image"}),
        _user({"type": ["text"], "text": "a"}),
        _user({"type": "image_embeds", "image_embeds": "AAAA"}),
        _user({"type": "prompt_embeds", "data": "AAAA"}),
        _user({"type": "input_audio", "input_audio": {"data": "AAAA"}}),
        _user({"type": "video_url", "video_url": {"url": URL}}),
        _user({"type": "image", "source": {"type": "url", "url": URL}}),
        _user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}),
        _user({"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}}),
        _user({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": URL}}]}),
        _user([{"type": "image_pil", "image_pil": URL}]),
        {"messages": [[{"role": "user", "content": [{"type": "image_pil"}]}]]},
        {"messages": [{"role": "user", "content": {"type": "image_pil"}}]},
        {"messages": [{"role": "user", "content": [{"role": "user", "type": "image_pil"}]}]},
        {"messages": [{"type": "image_pil"}]},
        {"messages": [{"role": "user", "content": "a", "image_url": URL}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": URL}]}]},
        {"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": URL}}]},
        {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "file_id": "a"}]}]},
        {"system": [{"type": "image", "source": {"type": "url", "url": URL}}], "messages": []},
        {"content_parts": [{"type": "image_url", "image_url": {"url": URL}}]},
        {"queries": {"content": [{"type": "image_url"}]}},
        {"prompt": "a", "multi_modal_data": {"image": URL}},
        {"prompt": "a", "features": {"mm_hashes": {}}},
        {"prompt": "a", "prompt_embeds": "AAAA"},
        {"messages": [], "mm_processor_kwargs": {"size": {"longest_edge": 10**9}}},
        {"messages": [], "media_io_kwargs": {"image": {}}},
    ],
)
def test_media_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"/v1/generate|list of parts"):
        check_text_only(document)


def test_parts_without_contents_stand_for_images_where_they_are_taken() -> None:
    check_text_only([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], images=True)
    for part in ({"type": "image", "image": URL}, {"type": "image", "url": URL}, {"type": "video"}):
        with pytest.raises(InvalidRequest):
            check_text_only([{"role": "user", "content": [part]}], images=True)
