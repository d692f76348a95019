"""Prompts with images: told apart by their pixels, and sent without loss."""

from __future__ import annotations

import base64
import io
import random
from collections import OrderedDict

import pytest
from PIL import Image as Pillow

from learner.rollouts.dispatch import fitting, group_requests
from learner.rollouts.images import with_images
from learner.servers import prompts
from learner.servers.prompts import body_bytes, encoded_image, images_of
from shared.errors import InvalidRequest, TooLarge
from shared.rollouts import GenerateRequest, Prompt
from shared.sampling import SamplingParams
from shared.weights import ServerState

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


def noise(seed: int, side: int = 64) -> Pillow.Image:
    return Pillow.frombytes("RGB", (side, side), random.Random(seed).randbytes(side * side * 3))


def test_requests_are_cut_by_what_a_server_takes(server_state: ServerState) -> None:
    photos = [[noise(seed), noise(-seed)] for seed in range(1, 8)]
    groups = group_requests(with_images([[7] * 50] * 7 + [[1, 2]], [*photos, None]))
    whole = server_state.model_copy(update={"max_body_bytes": 2**25, "max_image_memory": 2**30})
    assert fitting(groups, server_state) == fitting(groups, whole) == [groups]
    bodies = whole.model_copy(update={"max_body_bytes": 2**18 + 3 * body_bytes(groups[0].token_ids)})
    parts = fitting(groups, bodies)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [group for part in parts for group in part] == groups
    for part in parts:
        sent = [Prompt(token_ids=list(group.token_ids), images=images_of(group.token_ids)) for group in part]
        body = GenerateRequest(prompts=sent, sampling=SamplingParams())
        assert len(body.model_dump_json()) < bodies.max_body_bytes
    memory = whole.model_copy(update={"max_image_memory": 4 * 30 * 2**13})
    assert [len(part) for part in fitting(groups, memory)] == [2, 2, 2, 2]
    tiles = memory.model_copy(update={"least_image_memory": 2 * 30 * 2**13})
    assert [len(part) for part in fitting(groups, tiles)] == [1] * 6 + [2], "each image is scaled up"


@pytest.mark.parametrize(
    ("limits", "flag"), [({"max_body_bytes": 2**18 + 9000}, "max-body-mib"), ({"max_image_memory": 9000}, "max-bodies")]
)
def test_a_prompt_that_no_request_holds_is_refused_with_the_flag(
    server_state: ServerState, limits: dict[str, int], flag: str
) -> None:
    groups = group_requests(with_images([[1, 2]], [[noise(1)]]))
    with pytest.raises(TooLarge, match=f"1 images .*--{flag}"):
        fitting(groups, server_state.model_copy(update=limits))


def test_encoded_images_are_kept_as_long_as_they_are_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(encoded_image(noise(0))[0].data)
    monkeypatch.setattr(prompts, "_KEPT", 3 * size)
    monkeypatch.setattr(prompts, "_encoded", OrderedDict())
    monkeypatch.setattr(prompts, "_encoded_bytes", 0)
    for seed in (1, 2, 3, 1, 4):
        encoded_image(noise(seed))
    digests = [encoded_image(noise(seed))[1] for seed in (3, 1, 4)]
    assert list(prompts._encoded) == digests
