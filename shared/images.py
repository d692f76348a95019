"""Images of prompts as bytes, and the digest by which two sides see that they hold the same pixels."""

from __future__ import annotations

import xxhash
from pydantic import ConfigDict, Field

from shared.bounds import FewFields


class Image(FewFields):
    """An image of a prompt. Never an address: a server fetches nothing for a client."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(min_length=1, description="a PNG file in base64, RGB with 8 bits")


#: Of the longer edge to the shorter. Processors round edges up to whole patches, and scale a short one up with the long
#: one beside it, so that a line of few pixels would take gigabytes; Qwen-VL's takes up to 200.
LARGEST_ASPECT = 20
#: Of each pixel: RGB, the model's pixel values (two frames of three float32 in Qwen-VL's), and RGB again while it is
#: scaled. Small images are scaled up, to at most so many pixels by Qwen-VL's default, and edges to at least a patch.
_BYTES_PER_PIXEL, _LEAST_PIXELS, _LEAST_EDGE = 3 + 24 + 3, 2**13, 32


def aspect_refusal(width: int, height: int) -> str | None:
    """Return why an image of this size is taken by no side; None if it is."""
    if 0 < max(width, height) <= LARGEST_ASPECT * min(width, height):
        return None
    return (
        f"{width} x {height} pixels, and one edge may be at most {LARGEST_ASPECT} times the other: pad or crop it, or "
        "cut it into several images"
    )


def memory_of(width: int, height: int, least: int = 0, shortest_edge: int = 0) -> int:
    """Return the bytes that a server counts for an image of this size once it is decoded and processed.

    Args:
        least: that the model's processor makes of every image; SmolVLM's scales small ones up to 17 tiles.
        shortest_edge: to which the processor scales the shorter edge of every image before it crops it, as CLIP's does;
            0: it scales otherwise.
    """
    pixels = max(width, _LEAST_EDGE) * max(height, _LEAST_EDGE)
    scaled = shortest_edge**2 * max(width, height) // min(width, height)
    return max(least, _BYTES_PER_PIXEL * max(_LEAST_PIXELS, pixels, scaled))


def pixel_digest(width: int, height: int, rgb: bytes) -> str:
    """Return the digest of an image as models see it: its size, and its RGB bytes row by row."""
    return xxhash.xxh3_128_hexdigest(b"%d %d " % (width, height) + rgb)
