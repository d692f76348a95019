"""Evaluation questions with images, as servers take them."""

from __future__ import annotations

import pytest
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from learner.evaluation.prompts import prompt_of, rewarded_row, shown
from learner.servers.prompts import encoded_image
from shared.errors import InvalidRequest

RED, BLUE = (Image.new("RGB", (4, 3), color) for color in ("red", "blue"))
TEXT = {"type": "text", "text": "How many?"}


def _user(content: object) -> list[dict[str, object]]:
    return [{"role": "system", "content": "Count."}, {"role": "user", "content": content}]


def test_images_of_a_column_come_first() -> None:
    made = prompt_of({"prompt": _user("How many?"), "images": [RED, BLUE]})
    assert made.messages == _user([{"type": "image"}, {"type": "image"}, TEXT])
    assert made.images == [encoded_image(RED)[0], encoded_image(BLUE)[0]]
    assert prompt_of({"prompt": _user("How many?"), "image": RED}).images == [encoded_image(RED)[0]]


def test_images_of_parts_stay_where_they_are() -> None:
    made = prompt_of({"prompt": _user([TEXT, {"type": "image", "image": BLUE}])})
    assert made.messages == _user([TEXT, {"type": "image"}])
    assert made.images == [encoded_image(BLUE)[0]]
    assert shown(_user([TEXT, {"type": "image", "image": BLUE}])) == made.messages


def test_places_for_the_images_of_a_column_are_kept() -> None:
    made = prompt_of({"prompt": _user([TEXT, {"type": "image"}]), "image": RED})
    assert made.messages == _user([TEXT, {"type": "image"}])
    assert len(made.images) == 1


def test_images_go_where_trl_puts_them() -> None:
    parts, plain = [TEXT, {"type": "image"}], {"role": "user", "content": "And here?"}
    first = {"role": "user", "content": [TEXT]}
    for messages, images in (
        ([first, plain], [RED, BLUE]),
        ([plain, first], [RED]),
        ([{"role": "user", "content": [*parts, {"type": "image", "image": BLUE}]}], [RED]),
    ):
        laid_out = prepare_multimodal_messages(messages, images=images)
        made = prompt_of({"prompt": messages, "images": images})
        contents = [message["content"] for message in made.messages or ()]
        seen = [[{"type": "text", "text": each}] if isinstance(each, str) else each for each in contents]
        assert seen == [message["content"] for message in shown(laid_out)]
        pictures = [part["image"] for m in laid_out for part in m["content"] if part["type"] == "image"]
        assert made.images == [encoded_image(picture)[0] for picture in pictures]


def test_reward_functions_get_rows_as_trl_gives_them() -> None:
    rows = [
        {"prompt": _user("How many?"), "image": RED},
        {"prompt": _user([TEXT, {"type": "image"}, {"type": "image", "image": BLUE}]), "images": [RED]},
        {"prompt": _user("And without?"), "image": None},
    ]
    for row, images in zip(rows, ([RED], [RED], []), strict=True):
        made = rewarded_row(row)
        assert made["prompt"] == prepare_multimodal_messages(row["prompt"], images=images)
        assert made["images"] == images


@pytest.mark.parametrize("content", [[TEXT], [TEXT, {"type": "image"}, {"type": "image"}]])
def test_images_without_a_place_and_places_without_an_image_are_refused(content: list[dict[str, str]]) -> None:
    with pytest.raises(InvalidRequest, match=f"1 images .* places for {len(content) - 1}"):
        prompt_of({"prompt": _user(content), "image": RED})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": _user(["hi"])}, "'hi' is no part of a message"),
        ({"prompt": _user([{"type": "image_url", "image_url": "http://x/cat.png"}])}, "only text and images are taken"),
        ({"prompt": ["hi"]}, "'hi' is no message"),
        ({"prompt": _user("How many?"), "images": 3}, "column 'images': 3 is not an image"),
        ({"prompt": _user("How many?"), "images": RED}, "column 'images': an image that is in no list"),
        ({"prompt": _user("How many?"), "image": "cat.png"}, "'cat.png' is not an image"),
    ],
)
def test_what_is_neither_text_nor_an_image_is_refused(row: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        prompt_of(row)


def test_text_has_no_place_for_images() -> None:
    assert prompt_of({"prompt": "How many?", "image": None}).text == "How many?"
    with pytest.raises(InvalidRequest, match="chat messages"):
        prompt_of({"prompt": "How many?", "image": RED})
