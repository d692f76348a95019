"""Images of requests: counted and measured before a pixel is decoded, then decoded to RGB beside the event loop."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidRequest, LockstepError, TooLarge
from shared.images import Image, pixel_digest

if TYPE_CHECKING:
    from rollout_server.settings import ServerSettings

#: PIL's names of the formats that are decoded. It knows dozens more, some of which run other programs.
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_BYTES_PER_PIXEL = 3


@dataclass(frozen=True)
class Decoded:
    """An image in RGB, and the digest of its pixels."""

    picture: Any  # PIL's
    digest: str


@dataclass(frozen=True)
class ImageLimits:
    """What one prompt, and one image, may have."""

    count: int
    mib: int
    pixels: int

    @classmethod
    def of(cls, settings: ServerSettings) -> ImageLimits:
        return cls(settings.max_images, settings.max_image_mib, settings.max_image_pixels)

    def check_count(self, what: str, count: int) -> None:
        """Raise `too_large` if a prompt has more images than it may."""
        if count > self.count:
            raise TooLarge(f"{what} has {count} images, more than the server's --max-images {self.count}")

    def decode(self, what: str, image: Image) -> Decoded:
        """Decode an image; raises `invalid_request` or `too_large`, which say what is wrong with `what`."""
        if len(image.data) * 3 // 4 > self.mib * 2**20 + 2:
            raise TooLarge(f"{what} is larger than the server's --max-image-mib {self.mib}; send a smaller file")
        try:
            data = base64.b64decode(image.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"{what}: data is no base64: {error}") from error
        return self._decode(what, data, image.media_type)

    def _decode(self, what: str, data: bytes, media_type: str) -> Decoded:
        from PIL import Image as Pillow

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PIL at its own limit of pixels; ours is checked next
                opened = Pillow.open(io.BytesIO(data), formats=[FORMATS[media_type]])
            width, height = opened.size
            if width * height > self.pixels:
                raise TooLarge(
                    f"{what} has {width} x {height} pixels, more than the server's --max-image-pixels {self.pixels}; "
                    "scale it down"
                )
            rgb = opened.convert("RGB").tobytes()
        except LockstepError:
            raise
        except Pillow.DecompressionBombError as error:
            raise TooLarge(f"{what}: more pixels than --max-image-pixels {self.pixels}: {error}") from error
        except Exception as error:  # PIL's decoders raise whatever a broken file makes them
            raise InvalidRequest(
                f"{what} cannot be decoded as {media_type}: {type(error).__name__}: {error}"
            ) from error
        # Made of the pixels alone: what else a file says (an id in its EXIF data) must not reach vLLM's caches.
        return Decoded(Pillow.frombytes("RGB", (width, height), rgb), pixel_digest(width, height, rgb))


def memory(decoded: Sequence[Decoded]) -> int:
    """Return the bytes that images take as pixels."""
    return sum(_BYTES_PER_PIXEL * image.picture.width * image.picture.height for image in decoded)
