"""Data of a real TRL trainer: what would end the training in its middle is refused at the start, by row."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from learner.tasks.columns import exact_dataset
from learner.trainer.attach import attach
from learner.trainer.datasets import Prompts, measure_prompts
from shared.errors import InvalidRequest

ROWS = [{"prompt": f"w{i % 60} w{(i + 7) % 60}"} for i in range(1300)]
#: Shows the content of every message, and that it has other keys, and refuses a word.
TEMPLATE = (
    "{% for message in messages %}{% if message.content == 'refused' %}{{ raise_exception('no such word') }}{% endif %}"
    "{% for key in message %}{% if message[key] is none %}w50{% elif key == 'content' %}{{ message[key] }}{% else %}w1"
    "{% endif %} {% endfor %}{% endfor %}"
)


def with_rows(rows: Any) -> dict[str, Any]:
    return {"train_dataset": Dataset.from_list(rows) if isinstance(rows, list) else rows}


@pytest.fixture
def chat_tokenizer(model_dir) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset", "one of several"])
@pytest.mark.parametrize(
    "name", ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"]
)
def test_columns_named_like_arguments_of_rewards(make_trainer, client, part: str, name: str) -> None:
    rows = Dataset.from_list([{"prompt": "w1", name: "w1"}] * 4)
    given = {part: rows} if part != "one of several" else {"eval_dataset": {"hard": rows}}
    trainer = make_trainer(trainer_kwargs=given)
    with pytest.raises(InvalidRequest, match=f"has a column '{name}'.*rename"):
        attach(trainer, client=client)


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset", "one of several"])
@pytest.mark.parametrize("stream", [False, True])
def test_data_without_prompts(make_trainer, client, server, part: str, stream: bool) -> None:
    rows = Dataset.from_list([{"question": "w1", "answer": "w2"}] * 4)
    rows = rows.to_iterable_dataset() if stream else rows
    given = {part: rows} if part != "one of several" else {"eval_dataset": {"hard": rows}}
    trainer = make_trainer(trainer_kwargs=given)
    with pytest.raises(InvalidRequest, match="has no column 'prompt'; it has question, answer"):
        attach(trainer, client=client)
    assert not server.served


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ".join(["w1"] * 130), r"130 tokens: the training data, row 1203, 'w1 w1.*--max-model-len"),
        ("", "the training data, row 1203: a prompt must be text .* not empty, but it is ''"),
        (" ", "the training data, row 1203: the prompt is empty"),
        (None, "the training data, row 1203: a prompt must be text .* but it is None"),
    ],
)
def test_every_prompt_is_measured(make_trainer, client, prompt: str | None, message: str) -> None:
    trainer = make_trainer(trainer_kwargs=with_rows([*ROWS[:1202], {"prompt": prompt}, *ROWS[1203:]]))
    with pytest.raises(InvalidRequest, match=message) as refused:
        attach(trainer, client=client)
    assert "\n" not in refused.value.message


def test_prompts_of_the_evaluation_are_measured(make_trainer, client) -> None:
    long = Dataset.from_list([*ROWS[:600], {"prompt": " ".join(["w1"] * 130)}])
    trainer = make_trainer(trainer_kwargs={"eval_dataset": {"hard": long}}, eval_strategy="steps", eval_steps=1)
    with pytest.raises(InvalidRequest, match="130 tokens: hard, row 601"):
        attach(trainer, client=client)


def test_an_evaluation_that_is_not_made_is_not_measured(make_trainer, client) -> None:
    long = Dataset.from_list([{"prompt": " ".join(["w1"] * 130)}])
    attach(make_trainer(trainer_kwargs={"eval_dataset": long}, eval_strategy="no"), client=client).close()


@pytest.mark.parametrize("ranks", [2, 5])
def test_each_rank_measures_its_part(make_trainer, monkeypatch, ranks: int) -> None:
    """And all of them know the same afterwards, in the order of the rows."""
    rows = [*ROWS[:5], {"prompt": " ".join(["w1"] * 70)}, *ROWS[5:1000]]
    trainer, measured = make_trainer(trainer_kwargs=with_rows(rows)), []
    tokenize = trainer._tokenize_prompts
    monkeypatch.setattr(trainer, "_tokenize_prompts", lambda prompts: measured.extend(prompts) or tokenize(prompts))
    alone = measure_prompts(trainer)
    assert measured == [row["prompt"] for row in rows]
    parts: list[list[str]] = []

    def on_each(measure: partial[Prompts]) -> list[Prompts]:
        found = []
        for rank in range(ranks):
            measured.clear()
            found.append(measure.func(trainer, rank, ranks))
            parts.append(list(measured))
        return found

    monkeypatch.setattr("learner.trainer.datasets.on_every_rank", on_each)
    assert measure_prompts(trainer) == alone
    assert [prompt for part in parts for prompt in part] == [row["prompt"] for row in rows]
    assert max(map(len, parts)) <= len(rows) // ranks + 1
    assert "row 6" in alone.where


def test_a_prompt_that_the_chat_template_refuses(make_trainer, client, chat_tokenizer) -> None:
    rows = [{"prompt": [{"role": "user", "content": "refused" if i == 700 else "w1"}]} for i in range(800)]
    trainer = make_trainer(trainer_kwargs={**with_rows(rows), "processing_class": chat_tokenizer})
    with pytest.raises(InvalidRequest, match=r"row 701, 'refused': .*template refuses it .*no such word"):
        attach(trainer, client=client)


def test_keys_that_arrow_filled_in_are_not_shown(make_trainer, client, chat_tokenizer, server) -> None:
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": "w1"}]} for _ in range(8)]
    rows[3]["prompt"][0]["name"] = "w2"
    assert Dataset.from_list(rows)[0]["prompt"][0] == {"role": "user", "content": "w1", "name": None}
    trainer = make_trainer(trainer_kwargs={**with_rows(rows), "processing_class": chat_tokenizer}, max_steps=1)
    session = attach(trainer, client=client)
    trainer.train()
    session.close()
    asked = [prompt.token_ids for request in server.generated for prompt in request.prompts]
    shown = chat_tokenizer("w1")["input_ids"]
    assert {json.dumps(ids) for ids in asked} <= {json.dumps(shown * 2), json.dumps(shown * 3)}


def test_none_that_is_meant_is_shown(make_trainer, client, chat_tokenizer, server) -> None:
    """`datasets` keeps every message as it is where it is asked to."""
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": "w1"}]} for _ in range(8)]
    rows[3]["prompt"][0]["name"] = None
    given = with_rows(Dataset.from_list(rows, on_mixed_types="use_json"))
    trainer = make_trainer(trainer_kwargs={**given, "processing_class": chat_tokenizer}, max_steps=1)
    attach(trainer, client=client)
    shown = trainer._tokenize_prompts(trainer.train_dataset["prompt"][:4])[0]
    w1, w50 = (chat_tokenizer(word)["input_ids"] for word in ("w1", "w50"))
    assert shown == [w1 * 2, w1 * 2, w1 * 2, w1 * 2 + w50]


@pytest.mark.parametrize("name", ["image", "images"])
def test_image_columns_without_images(make_trainer, client, chat_tokenizer, name: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": "w1"}], name: None} for i in range(8)]
    given = {"eval_dataset": Dataset.from_list(rows), "processing_class": chat_tokenizer}
    trainer = make_trainer(
        trainer_kwargs={**with_rows(rows), **given}, max_steps=1, eval_strategy="steps", per_device_eval_batch_size=8
    )
    session = attach(trainer, client=client)
    trainer.train()
    session.close()
    assert any("eval_reward" in log for log in trainer.state.log_history)


def test_images_are_refused_by_row(make_trainer, client) -> None:
    trainer = make_trainer(
        trainer_kwargs=with_rows([{**row, "image": "cat.png" if i == 4 else None} for i, row in enumerate(ROWS[:8])])
    )
    with pytest.raises(
        InvalidRequest, match="the training data, row 5, column 'image': an image, and the model sees none"
    ):
        attach(trainer, client=client)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            {"type": "image_url", "image_url": {"url": "http://x/cat.png"}},
            "'image_url': only text and images are taken",
        ),
        ({"type": "video", "video": "cat.mp4"}, "'video': only text and images are taken"),
        ({"type": "image"}, "'image', and the model sees none"),
        ({"type": "text", "text": "w2", "image_url": None}, "'text' with 'image_url': only text"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_media_in_messages_are_no_text(
    make_trainer, client, chat_tokenizer, part: Any, said: str, streams: bool
) -> None:
    """Templates print their tokens. Streams are read as they are drawn."""
    contents = ["w1", [{"type": "text", "text": "w1"}], [part], "w1"]
    rows = exact_dataset({"prompt": [[{"role": "user", "content": content}] for content in contents]}, "rows")
    given = IterableDataset.from_generator(lambda: iter(list(rows))) if streams else rows
    trainer = make_trainer(
        trainer_kwargs={**with_rows(given), "processing_class": chat_tokenizer}, max_steps=4, shuffle_dataset=False
    )
    where = "" if streams else "the training data, row 3, .*"
    with pytest.raises(InvalidRequest, match=f"^{where}a part of type .*{said}"):
        session = attach(trainer, client=client)
        assert streams
        try:
            trainer.train()
        finally:
            session.close()
