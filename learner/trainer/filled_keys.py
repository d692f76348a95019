"""Messages with their own keys only: Arrow gives all messages of a column the same ones, with None where one has none.

Which None was in the row cannot be told any more, so none is shown; `Dataset.from_list(rows,
on_mixed_types="use_json")` keeps them apart, as the tasks of files do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from trl import GRPOTrainer

from learner.tasks.columns import is_filled, own_keys
from learner.trainer.chat_forms import shown_prompt

T = TypeVar("T")


def named_datasets(trainer: GRPOTrainer) -> Iterator[tuple[str, Any]]:
    """Yield the training data and the data of evaluations, with names for messages."""
    evaluation = trainer.eval_dataset
    named = evaluation if isinstance(evaluation, dict) else {"the evaluation data": evaluation}
    for name, rows in {"the training data": trainer.train_dataset, **named}.items():
        if isinstance(rows, Dataset | IterableDataset):
            yield name, rows


def with_own_keys(trainer: GRPOTrainer, prompt: Any, *, images: bool = False) -> Any:
    """Return a prompt as chat templates are to see it, see `own_keys`.

    Args:
        images: the model sees images; a stream that does not name its columns counts as filled.
    """
    features = [rows.info.features for _, rows in named_datasets(trainer)]  # `rows.features` is a copy each time
    filled = any(is_filled(each.get("prompt")) if each else images for each in features)
    return own_keys(prompt, filled=filled, images=images)


def show_own_text(trainer: GRPOTrainer) -> None:
    """Let chat templates see messages with their own keys only, in a form of which they show all text.

    A prompt of a group is tokenized once: with a small model a tokenizer takes longer than the passes. Images are not
    compared.
    """
    tokenize = trainer._tokenize_prompts

    def shown(prompts: list[Any]) -> Any:
        return tokenize([shown_prompt(trainer, with_own_keys(trainer, prompt)) for prompt in prompts])

    def tokenize_shown(prompts: list[Any]) -> Any:
        if isinstance(trainer.processing_class, ProcessorMixin):
            return shown(prompts)
        distinct, places = distinct_runs(prompts)
        ids, images, fields = shown(distinct)
        if images or fields:
            return shown(prompts)
        return [list(ids[place]) for place in places], images, fields

    trainer._tokenize_prompts = tokenize_shown


def distinct_runs(values: Sequence[T]) -> tuple[list[T], list[int]]:
    """Return values without those that equal the one before, and where in them each value is.

    Example:
        assert distinct_runs(["a", "a", "b", "a"]) == (["a", "b", "a"], [0, 0, 1, 2])
    """
    distinct: list[T] = []
    places: list[int] = []
    for value in values:
        if not distinct or value != distinct[-1]:
            distinct.append(value)
        places.append(len(distinct) - 1)
    return distinct, places
