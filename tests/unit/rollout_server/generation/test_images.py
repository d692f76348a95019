"""Images are measured before they are decoded, and what is decoded is nothing but pixels."""

from __future__ import annotations

import base64
import io
import zlib
from dataclasses import replace

import pytest
from PIL import Image as Pillow

from rollout_server.generation.images import Decoded, ImageLimits, decode
from shared.errors import InvalidRequest, TooLarge
from shared.images import Image, pixel_digest
from tests.support.png import SIGNATURE, chunk, png, says, with_chunk

LIMITS = ImageLimits(count=2, mib=1, pixels=10_000, bodies_mib=1)
SMALL = png(Pillow.new("RGB", (4, 4)))
NOISE = png(Pillow.effect_noise((90, 90), 50).convert("RGB"))
BOMB = zlib.compress(bytes(2**26))


def _image(data: bytes) -> Image:
    return Image(data=base64.b64encode(data).decode())


def _decoded(data: bytes) -> Decoded:
    return decode("it", LIMITS.measure("it", _image(data)))


def _jpeg() -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", (40, 40)).save(stream, "JPEG")
    return stream.getvalue()


def test_an_image_is_decoded_to_its_pixels() -> None:
    picture = Pillow.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
    decoded = _decoded(png(picture))
    assert decoded.picture.tobytes() == picture.tobytes()
    assert decoded.digest == pixel_digest(40, 30, picture.tobytes())


@pytest.mark.parametrize(("kind", "content"), [(b"zTXt", b"a\0\0" + BOMB), (b"iCCP", b"a\0\0" + BOMB), (b"pHYs", b"")])
def test_what_else_a_file_says_is_not_looked_into(kind: bytes, content: bytes) -> None:
    assert not _decoded(with_chunk(SMALL, kind, content)).picture.info


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (says(60_000, 60_000), TooLarge, "60000 x 60000"),
        (says(2**32 - 1, 2**32 - 1), TooLarge, "--max-image-pixels"),
        (says(0, 4), InvalidRequest, "0 x 4"),
        (png(Pillow.new("RGB", (1, 5000))), InvalidRequest, "1 x 5000 pixels, and one edge may be at most 20 times"),
        (png(Pillow.new("RGB", (210, 10))), InvalidRequest, "210 x 10"),
        (png(Pillow.new("RGB", (200, 100))), TooLarge, "200 x 100"),
        (SMALL + bytes(2**20), TooLarge, "--max-image-mib"),
        (SMALL + b"\0", InvalidRequest, "1 bytes behind"),
        (SMALL[:-1], InvalidRequest, "truncated"),
        (SMALL[:-12], InvalidRequest, "truncated"),
        (NOISE[:500], InvalidRequest, "truncated"),
        (NOISE[:500] + chunk(b"IEND"), InvalidRequest, "truncated"),
        (says(4, 4), InvalidRequest, "cannot be decoded"),
        (SMALL[:41] + b"\xff" * 8 + SMALL[49:], InvalidRequest, "cannot be decoded"),
        (SMALL.replace(b"IHDR", b"IHDX"), InvalidRequest, "no PNG file"),
        (SIGNATURE, InvalidRequest, "8 bytes"),
        (_jpeg(), InvalidRequest, "no PNG file"),
        (png(Pillow.new("RGBA", (4, 4))), InvalidRequest, "RGBA with 8 bits"),
        (png(Pillow.new("P", (4, 4))), InvalidRequest, "P with"),
        (png(Pillow.new("L", (4, 4))), InvalidRequest, "L with 8 bits"),
        (png(Pillow.new("I;16", (4, 4))), InvalidRequest, "L with 16 bits"),
        (with_chunk(SMALL, b"acTL", bytes(8)), InvalidRequest, "animation"),
        (with_chunk(SMALL, b"eXIf", bytes(8)), InvalidRequest, "EXIF"),
        (with_chunk(SMALL, b"tRNS", bytes(6)), InvalidRequest, "transparent"),
        (SMALL[:33] + chunk(b"teXt") * 40_000 + SMALL[33:], InvalidRequest, "too many chunks"),
    ],
)
def test_bad_images_are_refused(data: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        _decoded(data)


@pytest.mark.parametrize("data", ["!!!!", "AAA", "\xe9"])
def test_data_is_base64(data: str) -> None:
    with pytest.raises(InvalidRequest, match="base64"):
        LIMITS.measure("it", Image(data=data))


def test_too_many_images_are_refused() -> None:
    LIMITS.check_count("it", 2)
    with pytest.raises(TooLarge, match="--max-images 2"):
        LIMITS.check_count("it", 3)


def test_what_all_images_of_a_request_take_is_known_before_any_is_decoded() -> None:
    measured = LIMITS.measure("it", _image(says(100, 100)))
    assert LIMITS.memory([measured] * 3) == 3 * 10_000 * 30
    with pytest.raises(TooLarge, match="--max-bodies-mib 1"):
        LIMITS.memory([measured] * 4)
    with pytest.raises(TooLarge, match="--max-bodies-mib"):
        replace(LIMITS, least_memory=2**19 + 1).memory([measured] * 2)


def test_an_image_whose_shorter_edge_is_scaled_up_counts_as_what_it_becomes() -> None:
    limits = replace(LIMITS, shortest_edge=56)
    assert limits.memory([limits.measure("it", _image(says(20, 20)))] * 2)
    with pytest.raises(TooLarge, match="--max-bodies-mib"):
        limits.memory([limits.measure("it", _image(says(1, 20)))])
