"""A synthetic task for structured decoding: turn a sentence about a person into a JSON object."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from learner.tasks.base import Task
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import completion_text

_NAMES = "Ada", "Bruno", "Chen", "Dalia", "Emre", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mei", "Nuno"
_CITIES = ("Oslo", "Lagos", "Lima", "Osaka", "Porto", "Quito", "Riga", "Seoul", "Tunis", "Turin", "Wroclaw", "Zagreb")
_FORMS = (
    "{name}, who is {age}, moved to {city} last year.",
    "In {city} we met {name}, {age} years old.",
    "At {age}, {name} opened a bakery in {city}.",
    "{name} lives in {city} and has just turned {age}.",
)
_INSTRUCTION = "Reply with a JSON object with the keys name (text), age (number) and city (text), and nothing else.\n\n"


def people(
    *,
    eval_size: int,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None = None,
    reward_weights: Sequence[float] | None = None,
) -> Task:
    """Load with `--task learner.tasks.examples.extraction:people`."""
    everyone = [(name, age, city) for name in _NAMES for age in range(18, 90) for city in _CITIES]
    random.Random("lockstep people").shuffle(everyone)
    held_out, others = everyone[:eval_size], everyone[eval_size:]
    random.Random(seed).shuffle(others)
    functions, weights = load_rewards(reward_specs, reward_weights, own=fields_right)
    return Task(
        name="people",
        train=_rows(others[: train_size or 2000]),
        eval=_rows(held_out),
        reward_funcs=functions,
        reward_weights=weights,
    )


def fields_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return the share of fields of the column `answer` (JSON) that the completion has, too; 0 if it is not JSON."""
    shares = []
    for completion, gold in zip(completions, answer, strict=True):
        found, expected = None, json.loads(gold)
        with contextlib.suppress(ValueError):
            found = json.loads(completion_text(completion))
        right = [isinstance(found, dict) and found.get(key) == value for key, value in expected.items()]
        shares.append(sum(right) / len(right))
    return shares


def _rows(people: list[tuple[str, int, str]]) -> Dataset:
    rows = []
    for name, age, city in people:
        said = _FORMS[(age + len(name) + len(city)) % len(_FORMS)].format(name=name, age=age, city=city)
        answer = json.dumps({"name": name, "age": age, "city": city})
        rows.append({"prompt": [{"role": "user", "content": _INSTRUCTION + said}], "answer": answer})
    return Dataset.from_list(rows)
