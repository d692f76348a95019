"""Evaluation questions as prompts, with their images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.servers.prompts import encoded_image
from shared.errors import InvalidRequest
from shared.rollouts import Prompt


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a dataset row; images of a column come first in the first message of the user, as in TRL.

    Raises:
        LockstepError: `invalid_request` for images beside a prompt of text.
    """
    prompt, images = row["prompt"], _column(row)
    if isinstance(prompt, str):
        if images:
            raise InvalidRequest("a prompt with images must be a list of chat messages, not text")
        return Prompt(text=prompt)
    messages, found = [], list[Any]()
    for message in prompt:
        content = message.get("content")
        if images and message.get("role") == "user":
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            blank = [part for part in parts if part.get("type") == "image" and part.get("image") is None]
            content = parts if blank else [*({"type": "image"} for _ in images), *parts]
            found, images = found + images, []
        if isinstance(content, list):
            found += [
                part["image"] for part in content if part.get("type") == "image" and part.get("image") is not None
            ]
            content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
        messages.append({**message, "content": content})
    return Prompt(messages=messages, images=[encoded_image(image)[0] for image in found])


def shown(prompt: Any) -> Any:
    """Return a prompt as results keep it: without its images."""
    return prompt if isinstance(prompt, str) else prompt_of({"prompt": prompt}).messages


def _column(row: Mapping[str, Any]) -> list[Any]:
    if row.get("images") is not None:
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]
