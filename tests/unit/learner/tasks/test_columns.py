"""Parts of messages and image columns: what is text, what is an image, and what is refused by row."""

from __future__ import annotations

import io
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from PIL import Image

from learner.evaluation.evaluate import questions_of
from learner.tasks import Task, TaskError, load_task
from learner.tasks.columns import check_parts, has_images
from learner.tasks.dataset import _with_prompts
from learner.tasks.prompts import PromptStyle

REWARD = ["learner.tasks.rewards:exact_match"]


@pytest.mark.parametrize(
    "part", [{"type": "text", "text": "a", "source": "wiki", "uuid": "b"}, {"text": "a"}], ids=["more keys", "no type"]
)
def test_text_with_keys_that_no_template_takes_for_media_is_text(part: dict[str, Any]) -> None:
    check_parts([{"role": "user", "content": [part]}], images=False)
    check_parts([{"role": "user", "content": (part,)}], images=False)


def test_images_in_messages_themselves_are_refused_by_row() -> None:
    text = {"type": "text", "text": "How many?"}
    parts = [[{"type": "image"}, text], [{"type": "image", "image": Image.new("RGB", (28, 28))}, text]]
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": each}] for each in parts]})
    with pytest.raises(TaskError, match=r"rows, row 2: a message holds an image itself: put images into a column"):
        _with_prompts(rows, "rows", "prompt", PromptStyle())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://x/cat.png"}}], r"type 'image_url' .*a column `images`"),
        ([{"type": "input_image", "image_url": "http://x/cat.png"}], "type 'input_image' with 'image_url'"),
        ([{"type": "video", "video": "cat.mp4"}], "type 'video'"),
        ([{"type": "image", "path": "cat.png"}], "type 'image' with 'path'"),
        ([{"type": "image", "url": "http://x/cat.png"}], "type 'image' with 'url'"),
        ([{"type": "text", "text": "a", "video": "cat.mp4"}], "type 'text' with 'video'"),
        ([{"type": "tool_result", "content": [{"type": "image"}]}], "type 'image': only text"),
        ([{"type": ["text"], "text": "a"}], r"type \['text'\]: only text and images are taken"),
        ([{"words": "a"}], r'type None: .*write anything else as {"type": "text", "text": ...}'),
        (["hi"], r"'hi' is no part of a message: write {\"type\": \"text\""),
        ({"type": "text", "text": "a"}, "write text, or a list of parts"),
    ],
)
def test_parts_that_are_neither_text_nor_images_are_refused_by_row(tmp_path: Path, content: Any, said: str) -> None:
    good = [{"type": "image"}, {"type": "text", "text": "How many?", "image_url": None}]
    rows = [{"prompt": [{"role": "user", "content": each}]} for each in (good, "How many?", content)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=f"rows.jsonl, row 3: .*{said}"):
        load_task(str(tmp_path / "rows.jsonl"), eval_size=1, reward_specs=REWARD)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"images": 3}, "column 'images': 3 is not an image"),
        ({"image": 3}, "column 'image': 3 is not an image"),
        ({"images": [None]}, "column 'images': None is not an image: .*leave it out"),
        ({"images": ["cat.png"]}, "column 'images': 'cat.png' is not an image"),
        ({"images": Image.new("RGB", (4, 4))}, "column 'images': an image that is in no list"),
    ],
)
def test_image_columns_of_other_values_are_refused_by_row(column: dict[str, Any], said: str) -> None:
    (name,) = column
    (value,) = column.values()
    rows = [{"prompt": "a", name: None}, {"prompt": "b", name: value}]
    with pytest.raises(TaskError, match=f"^rows, row 2, {said}"):
        _with_prompts(Dataset.from_list(rows), "rows", "prompt", PromptStyle())
    if name == "images" and isinstance(value, list):  # behind rows that have images
        features = Features(prompt=Value("string"), images=List(Picture()))
        data = {"prompt": ["a", "b"], "images": [[Image.new("RGB", (4, 4))], [None]]}
        with pytest.raises(TaskError, match=r"^rows, row 2: column 'images': None is not an image"):
            _with_prompts(Dataset.from_dict(data, features), "rows", "prompt", PromptStyle())


def drawings(
    prompts: list[str], shades: list[int | None], column: str = "image", size: tuple[int, int] = (4, 2)
) -> Any:
    pictures = [None if shade is None else Image.new("RGB", size, (shade, 0, 0)) for shade in shades]
    if column == "image":
        return Dataset.from_dict(
            {"prompt": prompts, "image": pictures}, Features(prompt=Value("string"), image=Picture())
        )
    lists = [[] if picture is None else [picture] for picture in pictures]
    return Dataset.from_dict(
        {"prompt": prompts, column: lists}, Features(prompt=Value("string"), images=List(Picture()))
    )


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_question_is_its_text_and_its_images(tmp_path: Path, column: str, caplog) -> None:
    """Whatever the column in which these are: other pictures beside the same text are other questions."""
    asked = ["How many circles?"]
    drawings([*asked * 6, "And without?", "And none?"], [1, 2, 3, 4, 5, 6, None, None]).to_parquet(
        tmp_path / "train.parquet"
    )
    drawings([*asked * 4, "And without?"], [2, 101, 102, 103, None], column).to_parquet(tmp_path / "eval.parquet")
    options: dict[str, Any] = {"reward_specs": REWARD, "eval_dataset": str(tmp_path / "eval.parquet")}
    task = load_task(str(tmp_path / "train.parquet"), **options)
    assert sorted(image.getpixel((0, 0))[0] for image in task.train["image"] if image) == [1, 3, 4, 5, 6]
    assert len(task.train) == 6, "and the question without an image that is in both is left out, too"
    assert "left out 2 training rows" in caplog.text
    few = [load_task(str(tmp_path / "train.parquet"), eval_size=size, **options).eval.to_dict() for size in (2, 4)]
    assert few[0] == {name: values[:2] for name, values in few[1].items()}


def test_pictures_of_other_sizes_are_other_questions(tmp_path: Path) -> None:
    drawings(["How wide?"] * 3, [1, 2, 3], size=(2, 4)).to_parquet(tmp_path / "eval.parquet")
    drawings(["How wide?"] * 3, [1, 2, 3], size=(4, 2)).to_parquet(tmp_path / "train.parquet")
    evaluation = str(tmp_path / "eval.parquet")
    assert len(load_task(str(tmp_path / "train.parquet"), reward_specs=REWARD, eval_dataset=evaluation).train) == 3


def broken(kind: str, path: Path, column: str = "image", row: int = 5) -> Dataset:
    """Return six questions with images, one of which no decoder takes."""
    whole = io.BytesIO()
    Image.effect_noise((56, 56), 90).convert("RGB").save(whole, "PNG")
    file = {
        "truncated": {"bytes": whole.getvalue()[:300], "path": None},
        "nonsense": {"bytes": b"nonsense", "path": None},
        "damaged": {"bytes": whole.getvalue().replace(b"IDAT", b"ID\0T"), "path": None},
        "gone": {"bytes": None, "path": str(path / "gone.png")},
    }[kind]
    files: list[Any] = [{"bytes": whole.getvalue(), "path": None}] * 6
    files[row - 1] = file
    asked = [[{"role": "user", "content": f"w{i}"}] for i in range(6)]
    chats = List({"role": Value("string"), "content": Value("string")})
    if column == "image":
        return Dataset.from_dict({"prompt": asked, "image": files}, Features(prompt=chats, image=Picture()))
    features = Features(prompt=chats, images=List(Picture()))
    return Dataset.from_dict({"prompt": asked, "images": [[file] for file in files]}, features)


@pytest.mark.parametrize("row", [1, 5])
@pytest.mark.parametrize(
    ("kind", "column"), [("truncated", "image"), ("nonsense", "images"), ("damaged", "image"), ("gone", "images")]
)
def test_a_broken_image_is_refused_by_row(tmp_path: Path, kind: str, column: str, row: int) -> None:
    rows, where = broken(kind, tmp_path, column, row), f"row {row}, cannot be decoded .*replace its image"
    with pytest.raises(TaskError, match=f"^rows, {where}"):
        _with_prompts(rows, "rows", "prompt", PromptStyle())
    with pytest.raises(TaskError, match=f"task toy, evaluation, {where}"):
        questions_of(Task(name="toy", train=rows, eval=rows, reward_funcs=[]), None)
    if row == 1:  # of the others it does not look at any: the first has an image
        with pytest.raises(TaskError, match=f"the task's data, {where}"):
            has_images(rows)


def test_images_that_are_not_decoded_are_refused_by_row(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": ["a", "b"], "image": [None, b"PNG"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(TaskError, match=r"rows.parquet, row 2, column 'image': b'PNG' is not an image: load it"):
        load_task(str(tmp_path / "rows.parquet"), eval_size=1, reward_specs=REWARD)


@pytest.mark.parametrize("value", [datetime(2026, 1, 2), b"x", Decimal("0.1")])
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_messages_without_a_form_in_json_are_refused_by_row(tmp_path: Path, value: Any, column: str) -> None:
    chats = [[{"role": "user", "content": f"w{i}", "when": value if i == 2 else None}] for i in range(4)]
    Dataset.from_dict({column: chats}).to_parquet(tmp_path / "rows.parquet")
    message = rf"rows.parquet, row 3, column 'prompt': \[0\]\['when'\] is a {type(value).__name__}, .* as text"
    with pytest.raises(TaskError, match=message):
        load_task(str(tmp_path / "rows.parquet"), eval_size=1, reward_specs=REWARD, prompt_column=column)
