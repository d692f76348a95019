"""Names in prompts: kinds of content parts that are text, keys, kinds and tokens that stand for media."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: Kinds of content parts, and of items beside messages, that are text.
TEXT_KINDS = frozenset(
    {
        *("text", "input_text", "output_text", "refusal", "thinking", "redacted_thinking"),
        *("reasoning", "reasoning_text", "summary_text", "message", "item_reference"),
        *("tool_use", "tool_result", "tool_reference", "tool_addition", "tool_removal"),
        *("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "mcp_call"),
    }
)
#: Keys, and kinds, that name a medium by its address or by its contents.
MEDIA = re.compile(
    r"((image|video|audio|vision)\w*|input_(image|video|audio|file)|file|file_(url|id|data)|source|\w*_embeds|uuid"
    r"|mm_processor_kwargs|media_io_kwargs|multi_modal_\w+|features)",
    re.IGNORECASE,
)


def media_token_ids(config: Any, media: Iterable[str] = ("image", "video", "audio")) -> set[int]:
    """Return the ids of tokens that stand for media, by a model's configuration of transformers."""
    found = {getattr(config, f"{medium}_token_{end}", None) for medium in media for end in ("id", "index")}
    return {token for token in found if isinstance(token, int)}
