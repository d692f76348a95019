"""Prompts of a batch with the images that TRL hands over beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learner.servers.prompts import ImagePrompt, encoded_image


def with_images(prompts: Sequence[list[int]], images: Sequence[Any] | None) -> list[list[int]]:
    """Return the prompts [B][P], with their images where they have any.

    Args:
        images: of each row a list of PIL images, or None.

    Raises:
        LockstepError: `invalid_request` for an image that is none of PIL's, or not plain RGB.
    """
    if images is None:
        return list(prompts)
    return [_with(ids, own) if own else ids for ids, own in zip(prompts, images, strict=True)]


def _with(token_ids: list[int], images: Sequence[Any]) -> ImagePrompt:
    encoded, digests = zip(*map(encoded_image, images), strict=True)
    return ImagePrompt(token_ids, encoded, digests, [image.size for image in images])
