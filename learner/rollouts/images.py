"""Images of a batch as servers get them: without loss, and each encoded once."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from learner.servers.prompts import ImagePrompt
from shared.errors import InvalidRequest
from shared.images import Image, pixel_digest

#: Encoded images that are kept: TRL repeats each for all completions of its prompt, and requests a batch twice.
_KEPT = 1024
_encoded: OrderedDict[str, Image] = OrderedDict()


def with_images(prompts: Sequence[list[int]], images: Sequence[Any] | None) -> list[list[int]]:
    """Return the prompts [B][P], with their images where they have any.

    Args:
        images: of each row a list of PIL images, or None.

    Raises:
        LockstepError: `invalid_request` for an image that is none of PIL's.
    """
    if images is None:
        return list(prompts)
    return [_with(ids, own) if own else ids for ids, own in zip(prompts, images, strict=True)]


def _with(token_ids: list[int], images: Sequence[Any]) -> ImagePrompt:
    encoded, digests = zip(*map(_encode, images), strict=True)
    return ImagePrompt(token_ids, encoded, digests)


def _encode(picture: Any) -> tuple[Image, str]:
    from PIL import Image as Pillow

    if not isinstance(picture, Pillow.Image):
        raise InvalidRequest(
            f"an image of a prompt is a {type(picture).__name__}, not a PIL image: cast the column with "
            "datasets.Image(), or load it in the task"
        )
    rgb = picture.convert("RGB")
    digest = pixel_digest(*rgb.size, rgb.tobytes())
    if digest not in _encoded:
        stream = io.BytesIO()
        rgb.save(stream, "PNG", compress_level=1)
        _encoded[digest] = Image(data=base64.b64encode(stream.getvalue()).decode(), media_type="image/png")
        while len(_encoded) > _KEPT:
            _encoded.popitem(last=False)
    return _encoded[digest], digest
