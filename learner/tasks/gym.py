"""Tasks of reasoning-gym: made by a generator, scored by its own rules, no download."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import logging
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset

from learner.tasks.answer_parsing import extractor
from learner.tasks.base import Task, TaskError
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import PromptStyle, completion_text, question_key

logger = logging.getLogger(__name__)

DEFAULT_TRAIN_SIZE = 2000
MIN_TRAIN_QUESTIONS = 16
CHUNK = 20_000  # questions of one generator; the most that all of reasoning-gym's tasks accept

Entry = dict[str, Any]


def load_gym_task(
    name: str,
    task_args: dict[str, Any],
    *,
    eval_size: int,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None,
    reward_weights: Sequence[float] | None,
) -> Task:
    """`reasoning_gym:NAME`. See `learner.tasks.load_task`."""
    generator_args = dict(task_args)
    style = PromptStyle.take_from(generator_args)
    extract = extractor(generator_args.pop("answer", "last_number"))
    partial_credit = bool(generator_args.pop("partial_credit", True))
    for taken in ("seed", "size"):
        if taken in generator_args:
            raise TaskError(f"task argument {taken!r} of reasoning_gym:{name}: use --seed, --train_size, --eval_size")

    train_size = train_size or DEFAULT_TRAIN_SIZE

    # The held-out questions come from a stream of their own, which no training seed changes: whoever evaluates with
    # another seed still never asks a question that was trained on.
    eval_entries = _take_distinct(_stream(name, generator_args, "eval"), eval_size, style, known=set())
    if len(eval_entries) < eval_size:
        raise TaskError(_too_small(name, generator_args, len(eval_entries), eval_size))
    train_stream = _stream(name, generator_args, f"train {seed}")
    train_entries = _take_distinct(train_stream, train_size, style, known=set(eval_entries))
    if len(train_entries) < min(train_size, MIN_TRAIN_QUESTIONS):
        raise TaskError(_too_small(name, generator_args, eval_size + len(train_entries), eval_size))
    if len(train_entries) < train_size:
        logger.info("reasoning_gym:%s: %d different training questions, repeated", name, len(train_entries))

    held_out, trained_on = list(eval_entries.values()), list(train_entries.values())
    score = GymScore(name, generator_args, held_out + trained_on, extract, partial_credit)
    functions, weights = load_rewards(reward_specs, reward_weights, own=score)
    rows = [_row(i, entry, style) for i, entry in enumerate(held_out + trained_on)]
    order = _fill_up(len(trained_on), train_size, seed)
    return Task(
        name=f"reasoning_gym:{name}",
        train=Dataset.from_list([rows[len(held_out) + i] for i in order]),
        eval=Dataset.from_list(rows[: len(held_out)]),
        reward_funcs=functions,
        reward_weights=weights,
    )


def _take_distinct(stream: Iterator[Entry], size: int, style: PromptStyle, known: set[str]) -> dict[str, Entry]:
    """The first `size` questions that are new, by key; fewer if the generator runs dry.

    A generator cannot say how many questions it has. It counts as dry after ten times as many misses in a row as there
    are questions seen: of N equally likely ones, one still unseen is then missed with a probability of e**-10.
    """
    found: dict[str, Entry] = {}
    misses = 0
    while len(found) < size:
        if misses > 10 * (len(found) + len(known)) + 200:
            break
        entry = next(stream)
        key = question_key(style.prompt(entry["question"], entry))
        if key in known or key in found:
            misses += 1
        else:
            found[key], misses = entry, 0
    return found


def _stream(name: str, args: dict[str, Any], label: str) -> Iterator[Entry]:
    """Endless questions, the same ones for the same label."""
    for chunk in itertools.count():
        # Neighbouring generator seeds share all but one question (question i of seed s is made from s + i), so seeds
        # are spread out.
        seed = random.Random(f"lockstep {label} {chunk}").randrange(2**31)
        generator = _create(name, args, seed)
        for i in range(CHUNK):
            yield generator[i]


def _fill_up(questions: int, size: int, seed: int) -> list[int]:
    """`size` indices below `questions`: every question as often as every other, give or take one, shuffled."""
    rng = random.Random(f"lockstep order {seed}")
    order: list[int] = []
    while len(order) < size:
        order += rng.sample(range(questions), questions)
    return order[:size]


def _row(index: int, entry: Entry, style: PromptStyle) -> dict[str, Any]:
    answer = entry["answer"]
    return {
        "prompt": style.prompt(entry["question"], entry),
        "question": entry["question"],
        "answer": None if answer is None else str(answer),
        "gym_item": index,
    }


class GymScore:
    """A reward function: reasoning-gym's own score of the extracted answer, or whether that is full marks.

    It needs an entry's metadata, whose nested values a dataset column would not give back unchanged; so rows carry the
    entry's number only. A class, so that another process makes its scorer anew, with what importing it takes.
    """

    def __init__(
        self,
        name: str,
        args: dict[str, Any],
        entries: list[Entry],
        extract: Callable[[str], str | None],
        partial_credit: bool,
    ) -> None:
        self.__name__, self._args, self._entries = name, args, entries
        self._extract, self._partial_credit = extract, partial_credit
        self._scorer = _create(name, args, seed=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return GymScore, (self.__name__, self._args, self._entries, self._extract, self._partial_credit)

    def __call__(self, prompts: list[Any], completions: list[Any], gym_item: list[int], **_: Any) -> list[float]:
        return [self._one(completion, item) for completion, item in zip(completions, gym_item, strict=True)]

    def _one(self, completion: Any, item: int) -> float:
        answer = self._extract(completion_text(completion))
        value = 0.0 if answer is None else float(self._scorer.score_answer(answer, self._entries[item]))
        return value if self._partial_credit else float(value >= 1.0)


def _create(name: str, args: dict[str, Any], seed: int) -> Any:
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see reasoning_gym.factory.DATASETS"
        raise TaskError(f"reasoning-gym has no task {name!r}; {hint}")
    fields = [f.name for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
    if unknown := sorted(set(args) - set(fields)):
        raise TaskError(f"reasoning_gym:{name} has no argument {', '.join(unknown)}; it has {', '.join(fields)}")
    try:
        return create_dataset(name, seed=seed, size=CHUNK, **args)
    except (AssertionError, TypeError, ValueError) as error:
        raise TaskError(f"reasoning_gym:{name} refuses {args}: {error}") from error


def _too_small(name: str, args: dict[str, Any], questions: int, eval_size: int) -> str:
    return (
        f"reasoning_gym:{name} with {args or 'its defaults'} has about {questions} different questions: too few to "
        f"hold out {eval_size} and train on others (at least {MIN_TRAIN_QUESTIONS}). Widen task_args or lower eval_size"
    )


def import_reasoning_gym() -> None:
    """Import reasoning-gym, with or without pycosat.

    It imports pycosat for one of its hundred tasks (zebra_puzzles), and pycosat has no wheel: every install would need
    a compiler. Where it is missing a stand-in takes its place during the import, and raises once that task is used.
    """
    ready = "reasoning_gym" in sys.modules or "pycosat" in sys.modules
    if ready or importlib.util.find_spec("pycosat") is not None:
        importlib.import_module("reasoning_gym")
        return

    def unavailable(*_: Any, **__: Any) -> Any:
        raise TaskError("this reasoning-gym task needs pycosat: pip install pycosat (built by a C compiler)")

    stand_in = types.ModuleType("pycosat")
    stand_in.solve = stand_in.itersolve = unavailable  # type: ignore[attr-defined]
    sys.modules["pycosat"] = stand_in
    try:
        importlib.import_module("reasoning_gym")
    finally:
        del sys.modules["pycosat"]  # sympy prefers pycosat where it can be imported: it must not find this one
