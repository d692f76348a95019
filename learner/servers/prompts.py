"""Prompts with images, as requests carry them."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from shared.errors import InvalidRequest
from shared.images import Image, aspect_refusal, pixel_digest
from shared.weights import ServerState

_ORIENTATION = 0x0112
#: Of a token id in JSON, with its comma; and of an image beside its data.
_TOKEN_BYTES, _EXTRA_BYTES = 10, 64
#: Bytes of encoded images that are kept: TRL repeats each for all completions of a prompt, and requests a batch twice.
_KEPT = 2**28
_encoded: OrderedDict[str, Image] = OrderedDict()
_encoded_bytes = 0
_encoding = threading.Lock()


class ImagePrompt(list[int]):
    """Token ids of a prompt and its images: equal to another one only where ids and pixels are.

    Attributes:
        images: as they are sent.
        digests: of their pixels.
        sizes: of their pixels, width and height.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        images: Sequence[Image],
        digests: Sequence[str],
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(token_ids)
        self.images, self.digests, self.sizes = list(images), list(digests), list(sizes)

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


def memory_of(token_ids: Sequence[int], state: ServerState) -> int:
    """Return the bytes that a server counts for a prompt's images once they are decoded."""
    sizes = token_ids.sizes if isinstance(token_ids, ImagePrompt) else []
    return sum(state.image_memory(*size) for size in sizes)


def body_bytes(token_ids: Sequence[int]) -> int:
    """Return what a prompt adds to the body of a request, rounded up."""
    return _TOKEN_BYTES * len(token_ids) + sum(len(image.data) + _EXTRA_BYTES for image in images_of(token_ids))


def check_picture(picture: Any) -> None:
    """Refuse what cannot be sent as an image without loss, or is too long a line: `invalid_request`."""
    from PIL import Image as Pillow

    if not isinstance(picture, Pillow.Image):
        raise InvalidRequest(
            f"an image of a prompt is a {type(picture).__name__}, not a PIL image: cast the column with "
            "datasets.Image(), or load it in the task"
        )
    if picture.mode != "RGB" or picture.getexif().get(_ORIENTATION, 1) != 1:
        raise InvalidRequest(
            f"an image of a prompt is {picture.mode}, or to be turned (EXIF), and the model's processor would see "
            "another one than the server: send ImageOps.exif_transpose(image).convert('RGB') of PIL"
        )
    if refusal := aspect_refusal(*picture.size):
        raise InvalidRequest(f"an image of a prompt has {refusal}")


def encoded_image(picture: Any) -> tuple[Image, str]:
    """Return an image as it is sent, without loss, and the digest of its pixels.

    Raises:
        LockstepError: `invalid_request` if it is none of PIL's, or not plain RGB.
    """
    from PIL import Image as Pillow

    check_picture(picture)
    pixels = picture.tobytes()
    digest = pixel_digest(picture.width, picture.height, pixels)
    with _encoding:
        global _encoded_bytes
        if digest not in _encoded:
            stream = io.BytesIO()
            Pillow.frombytes("RGB", picture.size, pixels).save(stream, "PNG", compress_level=1)
            _encoded[digest] = Image(data=base64.b64encode(stream.getvalue()).decode())
            _encoded_bytes += len(_encoded[digest].data)
        _encoded.move_to_end(digest)
        while _encoded_bytes > _KEPT and len(_encoded) > 1:
            _encoded_bytes -= len(_encoded.popitem(last=False)[1].data)
        return _encoded[digest], digest
