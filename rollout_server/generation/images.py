"""Images of requests: PNG files, measured before any is decoded, then decoded to RGB beside the event loop."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import InvalidRequest, TooLarge
from shared.images import Image, aspect_refusal, memory_of, pixel_digest

if TYPE_CHECKING:
    from rollout_server.settings import ServerSettings

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">8sI4sIIBBBBB")  # the first chunk with it, without its checksum
_RGB = 2
_COLOURS = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
#: Chunks that change what an image looks like to some readers, and not to others.
_AMBIGUOUS = {b"acTL": "an animation", b"eXIf": "EXIF data", b"tRNS": "a transparent colour"}
_CHUNKS = 2**15


class Measured(NamedTuple):
    """An image's file, and the size that its header says."""

    data: bytes
    width: int
    height: int


class Decoded(NamedTuple):
    """An image in RGB, and the digest of its pixels."""

    picture: Any  # PIL's
    digest: str


@dataclass(frozen=True)
class ImageLimits:
    """What one prompt, one image, and all images of a request may have.

    Attributes:
        least_memory, shortest_edge: of the model's processor, see `shared.images.memory_of`.
    """

    count: int
    mib: int
    pixels: int
    bodies_mib: int
    least_memory: int = 0
    shortest_edge: int = 0

    @classmethod
    def of(cls, settings: ServerSettings, least_memory: int, shortest_edge: int) -> ImageLimits:
        """Return the server's limits, with what the model's processor makes of every image."""
        own = settings.max_images, settings.max_image_mib, settings.max_image_pixels, settings.max_bodies_mib
        return cls(*own, least_memory, shortest_edge)

    def check_count(self, what: str, count: int) -> None:
        """Raise `too_large` if a prompt has more images than it may."""
        if count > self.count:
            raise TooLarge(f"{what} has {count} images, more than the server's --max-images {self.count}")

    def memory(self, measured: Iterable[Measured]) -> int:
        """Return the bytes that images take once they are decoded and processed; raises `too_large`."""
        scaling = self.least_memory, self.shortest_edge
        size = sum(memory_of(image.width, image.height, *scaling) for image in measured)
        if size > self.bodies_mib * 2**20:
            raise TooLarge(
                f"the request's images take {size} bytes, more than the server's --max-bodies-mib {self.bodies_mib}; "
                "split the request, or scale them down"
            )
        return size

    def measure(self, what: str, image: Image) -> Measured:
        """Read an image's header; raises `invalid_request` or `too_large`, which say what is wrong with `what`."""
        if len(image.data) * 3 // 4 > self.mib * 2**20 + 2:
            raise TooLarge(f"{what} is larger than the server's --max-image-mib {self.mib}; send a smaller file")
        try:
            data = base64.b64decode(image.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"{what}: data is no base64: {error}") from error
        if len(data) < _HEADER.size:
            raise InvalidRequest(f"{what} is no PNG file: it has {len(data)} bytes")
        signature, length, chunk, width, height, depth, colour, *_ = _HEADER.unpack_from(data)
        if (signature, length, chunk) != (_SIGNATURE, 13, b"IHDR"):
            raise InvalidRequest(f"{what} is no PNG file")
        if not width or not height:
            raise InvalidRequest(f"{what} has {width} x {height} pixels")
        if width * height > self.pixels:
            raise TooLarge(
                f"{what} has {width} x {height} pixels, more than the server's --max-image-pixels {self.pixels}; "
                "scale it down"
            )
        if refusal := aspect_refusal(width, height):
            raise InvalidRequest(f"{what} has {refusal}")
        if (depth, colour) != (8, _RGB):
            mode = _COLOURS.get(colour, f"colour type {colour}")
            raise InvalidRequest(
                f"{what} is {mode} with {depth} bits; send RGB with 8 bits (PIL: image.convert('RGB'))"
            )
        return Measured(data, width, height)


def decode(what: str, image: Measured) -> Decoded:
    """Decode an image of which the header is known; raises `invalid_request`."""
    from PIL import Image as Pillow

    pixels = _pixel_file(what, image.data)
    try:
        rgb = Pillow.open(io.BytesIO(pixels), formats=["PNG"]).tobytes()
    except Exception as error:  # PIL's decoders raise whatever a broken file makes them
        raise InvalidRequest(f"{what} cannot be decoded as PNG: {type(error).__name__}: {error}") from error
    return Decoded(Pillow.frombytes("RGB", image[1:], rgb), pixel_digest(image.width, image.height, rgb))


def _pixel_file(what: str, data: bytes) -> bytes:
    """Return a PNG file with its pixels alone: text and profiles, which may be packed bombs, are not looked into."""
    place, packed, kind = len(_SIGNATURE), list[bytes](), b""
    for _ in range(_CHUNKS):
        head = data[place : place + 8]
        end = place + 12 + int.from_bytes(head[:4])
        if len(head) < 8 or end > len(data):
            raise InvalidRequest(f"{what} is truncated")
        kind = head[4:]
        if kind in _AMBIGUOUS:
            raise InvalidRequest(f"{what} has {_AMBIGUOUS[kind]} ({kind.decode()}); send its pixels as plain RGB")
        if kind == b"IDAT":
            packed.append(data[place + 8 : end - 4])
        place = end
        if kind == b"IEND":
            break
    if kind != b"IEND" or place != len(data):
        raise InvalidRequest(f"{what} has {len(data) - place} bytes behind its end, or too many chunks")
    header = data[8 : _HEADER.size + 4]
    return _SIGNATURE + header + _chunk(b"IDAT", b"".join(packed)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)
