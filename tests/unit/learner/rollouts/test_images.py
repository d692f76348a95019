"""Prompts with images: told apart by their pixels, and sent without loss."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image as Pillow

from learner.rollouts.dispatch import group_requests
from learner.rollouts.images import with_images
from learner.servers.prompts import images_of
from shared.errors import InvalidRequest

RED, BLUE = (Pillow.new("RGB", (4, 3), color) for color in ("red", "blue"))


def test_neighbors_with_other_images_are_other_prompts() -> None:
    prompts = with_images([[1, 2]] * 5, [[RED], [RED.copy()], [BLUE], None, [RED, BLUE]])
    assert [(request.first_row, request.n) for request in group_requests(prompts)] == [(0, 2), (2, 1), (3, 1), (4, 1)]
    assert [len(images_of(request.token_ids)) for request in group_requests(prompts)] == [1, 1, 0, 2]


def test_prompts_are_compared_with_their_images() -> None:
    (red,), (blue,) = with_images([[1, 2]], [[RED]]), with_images([[1, 2]], [[BLUE]])
    assert red == with_images([[1, 2]], [[RED]])[0]
    assert red != blue
    assert red != [1, 2]
    assert [1, 2] != red  # noqa: SIM300 - the order is what is checked
    assert [red] != [[1, 2]]


def test_pixels_arrive_as_they_are() -> None:
    picture = Pillow.effect_noise((20, 10), 90).convert("RGB")
    (image,) = images_of(with_images([[1]], [[picture]])[0])
    assert Pillow.open(io.BytesIO(base64.b64decode(image.data))).tobytes() == picture.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "CMYK", "1"])
def test_other_modes_are_refused_by_name(mode: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"is {mode}, .*convert\('RGB'\)"):
        with_images([[1]], [[Pillow.new(mode, (4, 3))]])


def test_a_picture_that_is_to_be_turned_is_refused() -> None:
    turned = RED.copy()
    turned.getexif()[0x0112] = 6
    with pytest.raises(InvalidRequest, match="exif_transpose"):
        with_images([[1]], [[turned]])


def test_nothing_but_pixels_is_sent() -> None:
    picture = Pillow.new("RGB", (5, 5), "green")
    picture.info["icc_profile"] = b"a profile"
    (image,) = images_of(with_images([[1]], [[picture]])[0])
    assert b"iCCP" not in base64.b64decode(image.data)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not a PIL image"):
        with_images([[1]], [["http://a.example/b.png"]])
