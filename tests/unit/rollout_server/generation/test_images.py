"""Images are measured before they are decoded, and what is decoded is nothing but pixels."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image as Pillow

from rollout_server.generation.images import ImageLimits
from shared.errors import InvalidRequest, TooLarge
from shared.images import Image, pixel_digest

LIMITS = ImageLimits(count=2, mib=1, pixels=10_000)


def _file(picture: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _image(data: bytes, media_type: Any = "image/png") -> Image:
    return Image(data=base64.b64encode(data).decode(), media_type=media_type)


def _says(width: int, height: int) -> bytes:
    """Return a PNG that says it has so many pixels, and holds none."""
    chunk = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 100) + b"IDAT"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_decoded_to_rgb(kind: str) -> None:
    picture = Pillow.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
    decoded = LIMITS.decode("it", _image(_file(picture, kind), f"image/{kind.lower()}"))
    assert decoded.picture.size == (40, 30)
    assert decoded.digest == pixel_digest(40, 30, decoded.picture.tobytes())


def test_what_else_a_file_says_is_left_out() -> None:
    exif = Pillow.Exif()
    exif[0x010E] = "an id"
    decoded = LIMITS.decode("it", _image(_file(Pillow.new("RGB", (4, 4)), exif=exif)))
    assert not decoded.picture.getexif()
    assert not decoded.picture.info


@pytest.mark.parametrize(
    ("image", "error", "says"),
    [
        (_image(_says(60_000, 60_000)), TooLarge, "more pixels"),
        (_image(_says(200, 100)), TooLarge, "200 x 100"),
        (_image(_file(Pillow.new("RGB", (200, 100)))), TooLarge, "--max-image-pixels"),
        (_image(_file(Pillow.new("RGB", (4, 4))) + bytes(2**20)), TooLarge, "--max-image-mib"),
        (_image(_file(Pillow.effect_noise((90, 90), 50))[:500]), InvalidRequest, "cannot be decoded"),
        (_image(_file(Pillow.new("RGB", (4, 4))), "image/jpeg"), InvalidRequest, "image/jpeg"),
        (_image(_file(Pillow.new("RGB", (4, 4)), "BMP")), InvalidRequest, "image/png"),
        (Image(data="!!!!"), InvalidRequest, "base64"),
        (_image(b""[:0] + b"\0"), InvalidRequest, "cannot be decoded"),
    ],
)
def test_bad_images_are_refused(image: Image, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LIMITS.decode("it", image)


def test_too_many_images_are_refused() -> None:
    LIMITS.check_count("it", 2)
    with pytest.raises(TooLarge, match="--max-images 2"):
        LIMITS.check_count("it", 3)
