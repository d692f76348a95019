"""Evaluation questions as prompts, with their images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.servers.prompts import encoded_image
from learner.tasks.columns import check_parts, message_parts, row_images
from shared.chat_forms import in_parts
from shared.errors import InvalidRequest
from shared.rollouts import Prompt
from shared.weights import ServerState


def prompt_of(row: Mapping[str, Any], *, sees: bool = False) -> Prompt:
    """Return the prompt of a dataset row, with its images.

    Args:
        sees: the task has images, so a training has all text in parts, as TRL writes it for processors.

    Raises:
        LockstepError: `invalid_request`, as `seen_prompt`.
    """
    prompt = seen_prompt(row)
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if sees:
        prompt = in_parts(prompt)
    images = [part["image"] for part in message_parts(prompt) if part.get("type") == "image"]
    return Prompt(messages=shown(prompt), images=[encoded_image(image)[0] for image in images])


def image_memory(row: Mapping[str, Any], state: ServerState) -> int:
    """Return the bytes that a server counts for a row's images. Raises as `seen_prompt`."""
    pictures = [part["image"] for part in message_parts(seen_prompt(row)) if part.get("type") == "image"]
    return sum(state.image_memory(*picture.size) for picture in pictures)


def rewarded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a task with images as a training gives it to reward functions: its prompt with its images and all
    text in parts, and `images` of every row as a list. Raises as `seen_prompt`.
    """
    prompt = seen_prompt(row)
    if isinstance(prompt, list):
        prompt = in_parts(prompt)
    return {**row, "prompt": prompt, "images": row_images(row)}


def seen_prompt(row: Mapping[str, Any]) -> Any:
    """Return the prompt of a dataset row, with the images of a column where TRL puts them: into empty image parts, and
    before the first message of the user that is plain text.

    Raises:
        LockstepError: `invalid_request` for images beside a prompt of text, for more or less of them than places, or
            for a part that is neither text nor an image.
    """
    prompt, images = row["prompt"], row_images(row)
    check_parts(prompt)
    if isinstance(prompt, str):
        if images:
            raise InvalidRequest("a prompt with images must be a list of chat messages, not text")
        return prompt
    messages = list(prompt)
    first = next((i for i, message in enumerate(messages) if _is_plain_question(message)), None)
    if images and first is not None:
        text = {"type": "text", "text": messages[first]["content"]}
        messages[first] = {**messages[first], "content": [*({"type": "image"} for _ in images), text]}
    places = [part.get("image") for part in message_parts(messages) if part.get("type") == "image"]
    if places.count(None) != len(images):
        raise InvalidRequest(
            f"a prompt has {len(images)} images beside its messages, and places for {places.count(None)}: give each an "
            'empty part {"type": "image"}, or none, and they come before the first text of the user'
        )
    left = iter(images)

    def filled(part: Any) -> Any:
        return {**part, "image": next(left)} if part.get("type") == "image" and part.get("image") is None else part

    return [
        {**message, "content": list(map(filled, message["content"]))}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def shown(prompt: Any) -> Any:
    """Return a prompt as results keep it: without its images."""
    if isinstance(prompt, str):
        return prompt
    return [
        {
            **message,
            "content": [{"type": "image"} if part.get("type") == "image" else part for part in message["content"]],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _is_plain_question(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "user" and isinstance(message.get("content"), str)
