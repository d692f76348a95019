"""Messages with their own keys only: Arrow gives all messages of a column the same ones, with None where one has none.

Which None was in the row cannot be told any more, so none is shown; `Dataset.from_list(rows,
on_mixed_types="use_json")` keeps them apart, as the tasks of files do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from trl import GRPOTrainer

from learner.tasks.columns import is_filled, own_keys
from learner.trainer.chat_forms import shown_prompt


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

    A prompt of a group is tokenized once: with a small model a tokenizer takes longer than the passes. Not with images,
    nor with environments, whose tools differ from row to row.
    """
    tokenize = trainer._tokenize_prompts
    one_by_one = isinstance(trainer.processing_class, ProcessorMixin) or trainer.environment_factories is not None

    def tokenize_shown(prompts: list[Any]) -> Any:
        distinct, places = (prompts, range(len(prompts))) if one_by_one else distinct_runs(prompts)
        ids, images, fields = tokenize([shown_prompt(trainer, with_own_keys(trainer, prompt)) for prompt in distinct])
        if one_by_one:
            return ids, images, fields
        spread = {name: [values[place] for place in places] for name, values in fields.items()}
        return [list(ids[place]) for place in places], images, spread

    trainer._tokenize_prompts = tokenize_shown


def distinct_runs(prompts: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Return prompts without those that are the same as the one before, and where in them each prompt is.

    1, 1.0 and True are equal, and so are mappings in another order, but templates render them apart: what is compared
    is `repr` of messages.

    Example:
        assert distinct_runs(["a", "a", "b", "a"]) == (["a", "b", "a"], [0, 0, 1, 2])
    """
    distinct: list[Any] = []
    places: list[int] = []
    last = None
    for prompt in prompts:
        seen = prompt if isinstance(prompt, str) else (type(prompt), repr(prompt))
        if not distinct or seen != last:
            distinct.append(prompt)
            last = seen
        places.append(len(distinct) - 1)
    return distinct, places
