"""Pictures, and PNG files: whole, and such as no encoder makes."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def noise(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    """Return a picture of random pixels, the same for the same seed."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(picture: Image.Image, **options: Any) -> bytes:
    """Return the file of an image."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", **options)
    return stream.getvalue()


def says(width: int, height: int, *, colour: int = 2, depth: int = 8) -> bytes:
    """Return a file that says it has so many pixels, and holds none."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT") + chunk(b"IEND")


def with_chunk(data: bytes, kind: bytes, content: bytes = b"") -> bytes:
    """Return a file with one more chunk behind its header."""
    return data[:33] + chunk(kind, content) + data[33:]
