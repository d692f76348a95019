"""Names in prompts: kinds of content parts that are text, and keys and kinds that stand for media."""

from __future__ import annotations

import re

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
