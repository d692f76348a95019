"""Prompts with images, as requests carry them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.images import Image


class ImagePrompt(list[int]):
    """Token ids of a prompt and its images: equal to another one only where ids and pixels are.

    Attributes:
        images: as they are sent.
        digests: of their pixels.
    """

    def __init__(self, token_ids: Sequence[int], images: Sequence[Image], digests: Sequence[str]) -> None:
        super().__init__(token_ids)
        self.images, self.digests = list(images), list(digests)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ImagePrompt) and self.digests == other.digests and list(self) == list(other)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # as of lists


def images_of(token_ids: Sequence[int]) -> list[Image]:
    """Return the images of a prompt; of plain token ids, none."""
    return token_ids.images if isinstance(token_ids, ImagePrompt) else []


def digests_of(token_ids: Sequence[int]) -> list[str]:
    """Return the digests of a prompt's images; of plain token ids, none."""
    return token_ids.digests if isinstance(token_ids, ImagePrompt) else []
