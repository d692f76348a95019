"""Images of prompts as bytes, and the digest by which two sides see that they hold the same pixels."""

from __future__ import annotations

import xxhash
from pydantic import ConfigDict, Field

from shared.bounds import FewFields


class Image(FewFields):
    """An image of a prompt. Never an address: a server fetches nothing for a client."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(min_length=1, description="a PNG file in base64, RGB with 8 bits")


#: Of each pixel: RGB, the model's pixel values (two frames of three float32 in Qwen-VL's), and RGB again while it is
#: scaled. Small images are scaled up.
_BYTES_PER_PIXEL, _LEAST_PIXELS = 3 + 24 + 3, 2**12


def memory_of(width: int, height: int, least: int = 0) -> int:
    """Return the bytes that a server counts for an image of this size once it is decoded and processed.

    Args:
        least: that the model's processor makes of every image; SmolVLM's scales small ones up to 17 tiles.
    """
    return max(least, _BYTES_PER_PIXEL * max(_LEAST_PIXELS, width * height))


def pixel_digest(width: int, height: int, rgb: bytes) -> str:
    """Return the digest of an image as models see it: its size, and its RGB bytes row by row."""
    return xxhash.xxh3_128_hexdigest(b"%d %d " % (width, height) + rgb)
