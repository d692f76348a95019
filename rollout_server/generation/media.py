"""What requests may hold beside text: nothing, but for empty parts that stand for the images of a prompt."""

from __future__ import annotations

from typing import Any

from shared.errors import InvalidRequest
from shared.media import MEDIA, TEXT_KINDS

#: Lists of content parts. The items of the second may be messages, too.
_CONTENTS = ("content", "content_parts", "output", "system", "summary")
_CONVERSATIONS = ("messages", "input")
_FOR_IMAGES = (
    "Images go as PNG files in base64 into `images` of a prompt of /v1/generate, or of a sequence of /v1/score; in "
    'messages {"type": "image"} says where'
)
_FOR_OTHERS = "Leave it out, or send its text in a message, as a part of type 'text' (of /v1/responses: 'input_text')"
#: Hold what a client names as it likes, and no route of vLLM looks for media in.
_FREE = frozenset(
    {
        *("tools", "functions", "arguments", "parameters", "definition", "input_schema", "metadata"),
        *("annotations", "citations", "documents"),
        *("response_format", "structured_outputs", "schema", "chat_template_kwargs", "vllm_xargs"),
    }
)


def check_text_only(document: Any, *, images: bool = False) -> None:
    """Check that a body for vLLM's routes, or a prompt's messages, hold text alone.

    Args:
        images: whether parts `{"type": "image"}` without contents are taken.

    Raises:
        LockstepError: `invalid_request`.
    """
    _check("messages" if isinstance(document, list) else "", document, images)


def _check(name: str, value: Any, images: bool) -> None:
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):  # others, such as token ids by the thousand, hold nothing
                _check_item(name, item, images)
                _check(name, item, images)
    elif isinstance(value, dict):
        is_part = name in _CONTENTS
        for key, inner in value.items():
            # Clients send back messages with all their fields, empty ones, too.
            if MEDIA.fullmatch(key) and (is_part or inner not in (None, [])):
                raise _refusal(key, _FOR_IMAGES)
            if key in _FREE or (key == "input" and value.get("type") == "tool_use"):
                continue
            if key == "content" and isinstance(inner, dict):
                raise InvalidRequest("content: send text, or a list of parts")
            _check(key, inner, images)


def _check_item(name: str, item: Any, images: bool) -> None:
    """Refuse a part of a kind that is no text; a message is none."""
    if not isinstance(item, dict) or name not in (*_CONTENTS, *_CONVERSATIONS):
        return
    kind = item.get("type")
    if name in _CONVERSATIONS and kind is None:
        return
    if not (isinstance(kind, str) and kind in TEXT_KINDS) and not (images and item == {"type": "image"}):
        is_medium = isinstance(kind, str) and MEDIA.fullmatch(kind)
        raise _refusal(f"a part of type {kind!r:.60}", _FOR_IMAGES if is_medium else _FOR_OTHERS)


def _refusal(what: str, advice: str) -> InvalidRequest:
    return InvalidRequest(f"{what}: only text is taken here. {advice}")
