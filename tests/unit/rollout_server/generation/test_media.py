"""vLLM's routes take text alone, whatever a medium is called and wherever it is put."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.generation.media import check_text_only
from shared.errors import InvalidRequest

URL = "http://127.0.0.1:1/a.png"
FORM = {
    "type": "json_schema",
    "schema": {"type": "object", "properties": {"source": {"type": "string"}, "image": {}, "uuid": {"enum": [URL]}}},
}


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
        {"messages": [], "response_format": {"type": "json_schema", "json_schema": {"name": "a", **FORM}}},
        {"input": "text", "text": {"format": {"name": "a", **FORM}}},
        {"messages": [], "output_config": {"format": FORM}},
        {"messages": [{"role": "assistant", "content": "a", "images": [], "audio": None}]},
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
        _user({"image_pil": []}),
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
        {"messages": [{"role": "user", "content": "a", "images": [URL]}]},
        {"input": "a", "text": {"format": {"image_url": URL}}},
        {"input": "a", "text": {"format": FORM, "image_url": URL}},
        {"messages": [], "output_config": {"format": FORM, "source": {"url": URL}}},
    ],
)
def test_media_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"only text is taken|list of parts"):
        check_text_only(document)


@pytest.mark.parametrize(
    "document",
    [
        {"input": [{"type": "local_shell_call", "action": {"type": "exec", "command": ["ls"]}}]},
        {"input": [{"type": "web_search_call", "action": {"type": "search", "query": "a"}}]},
        {"input": [{"type": "compaction", "encrypted_content": "a"}]},
        _user({"type": "search_result", "source": "a", "title": "b", "content": [{"type": "text", "text": "c"}]}),
        _user({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}),
        _user({"type": ["text"], "text": "a"}),
    ],
)
def test_other_kinds_are_refused_without_advice_on_images(document: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"a part of type .*: only text is taken here.*'text'") as refused:
        check_text_only(document)
    assert "PNG" not in str(refused.value)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image", "video_url", "input_file", "prompt_embeds"])
def test_kinds_of_media_are_refused_with_the_place_for_images(kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"a part of type '{kind}': only text is taken here. Images go as PNG"):
        check_text_only(_user({"type": kind}))


def test_parts_without_contents_stand_for_images_where_they_are_taken() -> None:
    check_text_only([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], images=True)
    for part in ({"type": "image", "image": URL}, {"type": "image", "url": URL}, {"type": "video"}):
        with pytest.raises(InvalidRequest):
            check_text_only([{"role": "user", "content": [part]}], images=True)
