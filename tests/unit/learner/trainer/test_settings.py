"""What tells the prompts of trainings apart: their texts and their images."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from learner.trainer import settings
from learner.trainer.settings import _digest_of_prompts

CHATS = List({"role": Value("string"), "content": Value("string")})
PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "image": Image()})})


def _rows(kind: str, shades: list[int | None]) -> Dataset:
    """Return equal questions with pictures, in a column or in a part; None: without."""
    pictures = [None if shade is None else Pillow.new("RGB", (8, 8), (shade, 0, 0)) for shade in shades]
    asked: list[Any] = [[{"role": "user", "content": "How many?"}] for _ in shades]
    if kind == "image":
        return Dataset.from_dict({"prompt": asked, "image": pictures}, Features(prompt=CHATS, image=Image()))
    if kind == "images":
        lists = [None if each is None else [each] for each in pictures]
        return Dataset.from_dict({"prompt": asked, "images": lists}, Features(prompt=CHATS, images=List(Image())))
    asked = [[{"role": "user", "content": [{"type": "image", "image": each}]}] for each in pictures]
    return Dataset.from_dict({"prompt": asked}, Features(prompt=PARTS))


@pytest.mark.parametrize("kind", ["image", "images", "part"])
def test_other_images_are_other_prompts(kind: str) -> None:
    first, *others = (_digest_of_prompts(_rows(kind, shades)) for shades in ([1, 2, None], [1, 3, None], [1, None, 2]))
    assert first not in others
    assert first == _digest_of_prompts(_rows(kind, [1, 2, None]))


def test_images_of_few_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(settings, "image_key", lambda image: seen.append(image) or "k")
    _digest_of_prompts(_rows("image", [1] * 1000))
    assert 200 <= len(seen) <= 256


def test_the_digest_of_text_is_that_of_older_checkpoints() -> None:
    text = Dataset.from_dict({"prompt": [f"{i} + {i + 3} =" for i in range(2500)]})
    assert _digest_of_prompts(text) == "2500 prompts (7986c2f7)"
    chats = _rows("image", [None] * 3).shuffle(seed=0)
    assert _digest_of_prompts(chats) == _digest_of_prompts(chats.remove_columns("image")) == "3 prompts (49b657f3)"
