"""Tasks of reasoning-gym: generated and scored by its own code, without a download."""

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

from learner.tasks.answer_parsing import EXTRACTORS
from learner.tasks.base import Task, TaskError
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import PromptStyle, completion_text, question_key

logger = logging.getLogger("lockstep.tasks")

DEFAULT_TRAIN_SIZE = 2000
MIN_TRAIN_QUESTIONS = 16
CHUNK = 20_000  # questions per generator: the largest size that all tasks of reasoning-gym accept

Entry = dict[str, Any]


def load_gym_task(
    name: str,
    task_args: dict[str, Any],
    *,
    eval_size: int,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None = None,
    reward_weights: Sequence[float] | None = None,
) -> Task:
    """Load `reasoning_gym:NAME`. See `learner.tasks.load_task`."""
    generator_args = dict(task_args)
    style = PromptStyle.take_from(generator_args)
    answer = generator_args.pop("answer", "last_number")
    if answer not in tuple(EXTRACTORS):  # which may be of any type
        raise TaskError(f"answer {answer!r} is not one of {', '.join(EXTRACTORS)}")
    partial_credit = generator_args.pop("partial_credit", True)
    if not isinstance(partial_credit, bool):
        raise TaskError(f"partial_credit {partial_credit!r} is neither true nor false")
    for reserved in ("seed", "size"):
        if reserved in generator_args:
            raise TaskError(
                f"task argument {reserved!r} of reasoning_gym:{name}: use --seed, --train_size, --eval_size"
            )
    train_size = train_size or DEFAULT_TRAIN_SIZE

    # The stream of held-out questions does not depend on the seed: an evaluation with another seed never asks training
    # questions.
    eval_entries = _take_distinct(_stream(name, generator_args, "eval"), eval_size, style, known=set())
    train_entries: dict[str, Entry] = {}
    if len(eval_entries) == eval_size:
        train_stream = _stream(name, generator_args, f"train {seed}")
        train_entries = _take_distinct(train_stream, train_size, style, known=set(eval_entries))
    if len(train_entries) < min(train_size, MIN_TRAIN_QUESTIONS):
        raise TaskError(
            f"reasoning_gym:{name} with {generator_args or 'its defaults'} has about "
            f"{len(eval_entries) + len(train_entries)} different questions: too few to hold out {eval_size} and train "
            f"on others (at least {MIN_TRAIN_QUESTIONS}). Widen task_args or lower eval_size"
        )
    if len(train_entries) < train_size:
        logger.info("reasoning_gym:%s: %d distinct training questions, repeated", name, len(train_entries))

    held_out, trained_on = list(eval_entries.values()), list(train_entries.values())
    score = GymScore(name, generator_args, held_out + trained_on, EXTRACTORS[answer], partial_credit)
    functions, weights = load_rewards(reward_specs, reward_weights, own=score)
    rows = [
        {
            "prompt": style.prompt(entry["question"], entry),
            "question": entry["question"],
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "gym_item": i,
        }
        for i, entry in enumerate(held_out + trained_on)
    ]
    order: list[dict[str, Any]] = []  # every question equally often, some of them once more
    rng = random.Random(f"lockstep order {seed}")
    while len(order) < train_size:
        order += rng.sample(rows[len(held_out) :], len(trained_on))
    return Task(
        name=f"reasoning_gym:{name}",
        train=Dataset.from_list(order[:train_size]),
        eval=Dataset.from_list(rows[: len(held_out)]),
        reward_funcs=functions,
        reward_weights=weights,
    )


def _take_distinct(stream: Iterator[Entry], size: int, style: PromptStyle, known: set[str]) -> dict[str, Entry]:
    """Return the first `size` new questions, by key; fewer if the generator is exhausted.

    A generator does not know how many questions it has. It counts as exhausted after ten times as many repetitions in a
    row as there are questions seen: of N equally likely questions, one is then still unseen with probability e**-10.
    """
    found: dict[str, Entry] = {}
    misses = 0
    while len(found) < size and misses <= 10 * (len(found) + len(known)) + 200:
        entry = next(stream)
        key = question_key(style.prompt(entry["question"], entry))
        if key in known or key in found:
            misses += 1
        else:
            found[key], misses = entry, 0
    return found


def _stream(name: str, args: dict[str, Any], label: str) -> Iterator[Entry]:
    """Yield questions without end; the same label gives the same questions."""
    for chunk in itertools.count():
        # Question i of seed s is generated from s + i: neighboring seeds share all but one question.
        seed = random.Random(f"lockstep {label} {chunk}").randrange(2**31)
        generator = _create(name, args, seed)
        for i in range(CHUNK):
            try:
                entry = generator[i]
            except TaskError:
                raise
            except Exception as error:  # of a generator that has checked its arguments in part
                why = f"{type(error).__name__}: {error}"
                raise TaskError(
                    f"reasoning_gym:{name} with {args or 'its defaults'} makes no question: {why}"
                ) from error
            yield entry


@dataclasses.dataclass(eq=False, repr=False)
class GymScore:
    """A reward function: reasoning-gym's own score of the extracted answer; without partial credit, 1 or 0.

    Rows carry only the entry's number: a dataset column would change nested values of its metadata, which the score
    needs. Pickled without its scorer, which needs `import_reasoning_gym`.
    """

    name: str
    args: dict[str, Any]
    entries: list[Entry]
    extract: Callable[[str], str | None]
    partial_credit: bool

    def __post_init__(self) -> None:
        self.__name__, self._scorer = self.name, _create(self.name, self.args, seed=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return GymScore, (self.name, self.args, self.entries, self.extract, self.partial_credit)

    def __call__(self, prompts: list[Any], completions: list[Any], gym_item: list[int], **_: Any) -> list[float]:
        scores = []
        for completion, item in zip(completions, gym_item, strict=True):
            answer = self.extract(completion_text(completion))
            value = 0.0 if answer is None else float(self._scorer.score_answer(answer, self.entries[item]))
            scores.append(value if self.partial_credit else float(value >= 1.0))
        return scores


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


def import_reasoning_gym() -> None:
    """Import reasoning-gym, with or without pycosat.

    Only one of its hundred tasks (zebra_puzzles) needs pycosat, which has no wheel, so that every install would need a
    compiler. Where it is missing, the import sees a stand-in, which raises when that task is used.
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
        del sys.modules["pycosat"]  # sympy uses pycosat where it can be imported, and must not find the stand-in
