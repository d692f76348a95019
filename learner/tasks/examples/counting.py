"""Count the circles in a picture: a task with images that is drawn here, without a download."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from PIL import ImageDraw

from learner.tasks.arguments import check_task_args
from learner.tasks.base import Task
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import completion_text

_PROMPT = "How many circles are there? Answer with a number."
_COLORS = ("crimson", "navy", "darkgreen", "orange")


def circles(
    task_args: dict[str, Any],
    *,
    eval_size: int,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None = None,
    reward_weights: Sequence[float] | None = None,
) -> Task:
    """Load with `--task learner.tasks.examples.counting:circles`; the reward is 1 for the right number.

    Args:
        task_args: `most` circles (default 6), and the pictures' `pixels` on a side (default 112).
    """
    check_task_args(task_args, "most", "pixels")
    most, pixels = int(task_args.get("most", 6)), int(task_args.get("pixels", 112))
    draw = random.Random(f"circles/{seed}")
    count = (train_size or 1024) + eval_size
    answers = [draw.randint(1, most) for _ in range(count)]
    features = Features(
        prompt=[{"role": Value("string"), "content": Value("string")}], image=Image(), answer=Value("string")
    )
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": _PROMPT}]] * count,
            "image": [_picture(draw, answer, pixels) for answer in answers],
            "answer": list(map(str, answers)),
        },
        features,
    )
    functions, weights = load_rewards(reward_specs, reward_weights, own=right_number)
    return Task(
        "circles", rows.select(range(eval_size, count)), rows.select(range(eval_size)), list(functions), weights
    )


def right_number(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return 1 where the first number of a completion is the column `answer`, else 0."""
    found = [re.search(r"\d+", completion_text(completion)) for completion in completions]
    return [float(number is not None and number[0] == gold) for number, gold in zip(found, answer, strict=True)]


def _picture(draw: random.Random, count: int, pixels: int) -> Pillow.Image:
    """Return a picture of circles that do not touch, and as many squares as there is room for among three."""
    picture = Pillow.new("RGB", (pixels, pixels), "white")
    pen, cells = ImageDraw.Draw(picture), [(x, y) for x in range(4) for y in range(4)]
    size = pixels // 4
    chosen = draw.sample(cells, min(count + draw.randint(0, 3), len(cells)))
    for number, (x, y) in enumerate(chosen):
        margin = draw.randint(1, max(size // 4, 1))
        box = (x * size + margin, y * size + margin, (x + 1) * size - margin, (y + 1) * size - margin)
        shape = pen.ellipse if number < count else pen.rectangle
        shape(box, fill=draw.choice(_COLORS))
    return picture
