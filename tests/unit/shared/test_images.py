from __future__ import annotations

import pytest
from pydantic import ValidationError

from shared.images import Image, pixel_digest
from shared.rollouts import Prompt, ScoreRequest


def test_digests_are_of_size_and_pixels() -> None:
    pixels = bytes(range(18))
    assert pixel_digest(3, 2, pixels) == pixel_digest(3, 2, pixels)
    assert pixel_digest(3, 2, pixels) != pixel_digest(2, 3, pixels)
    assert pixel_digest(3, 2, pixels) != pixel_digest(3, 2, bytes(18))


@pytest.mark.parametrize(
    "image",
    [
        {"data": ""},
        {"data": "AAAA", "media_type": "image/png"},
        {"url": "http://a.example/b.png"},
        {"data": "AAAA", "path": "/etc/passwd"},
    ],
)
def test_images_are_bytes_and_nothing_else(image: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Prompt.model_validate({"token_ids": [1], "images": [image]})


def test_every_sequence_has_its_images() -> None:
    with pytest.raises(ValidationError, match="one for each"):
        ScoreRequest(sequences=[[1, 2], [3, 4]], images=[[Image(data="AAAA")]])
