"""Images of prompts as bytes, and the digest by which two sides see that they hold the same pixels."""

from __future__ import annotations

from typing import Literal

import xxhash
from pydantic import ConfigDict, Field

from shared.bounds import FewFields

MediaType = Literal["image/png", "image/jpeg", "image/webp"]


class Image(FewFields):
    """An image of a prompt. Never an address: a server fetches nothing for a client."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(min_length=1, description="the file's bytes in base64")
    media_type: MediaType = "image/png"


def pixel_digest(width: int, height: int, rgb: bytes) -> str:
    """Return the digest of an image as models see it: its size, and its RGB bytes row by row."""
    return xxhash.xxh3_128_hexdigest(b"%d %d " % (width, height) + rgb)
