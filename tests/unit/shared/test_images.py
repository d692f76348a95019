from __future__ import annotations

import pytest
from pydantic import ValidationError

from shared.images import Image, aspect_refusal, memory_of, pixel_digest
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


def test_scaling_the_shorter_edge_up_counts() -> None:
    """As CLIP's processor does before it crops: 8 x 160 pixels become 336 x 6720."""
    for size in ((8, 160), (160, 8)):
        assert memory_of(*size, shortest_edge=336) == 30 * 336 * 6720
    assert memory_of(672, 1000, shortest_edge=336) == 30 * 672 * 1000


def test_edges_are_rounded_up_to_patches() -> None:
    assert memory_of(20, 400) == 30 * 32 * 400


@pytest.mark.parametrize(("size", "taken"), [((1, 20), True), ((20, 1), True), ((1, 21), False), ((5000, 1), False)])
def test_lines_are_taken_by_no_side(size: tuple[int, int], taken: bool) -> None:
    assert (aspect_refusal(*size) is None) is taken
