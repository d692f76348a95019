"""What a file says reaches prompts and rewards as it says it; what cannot is refused by file, row and column."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from trl.data_utils import apply_chat_template

from learner.tasks import TaskError, load_task
from learner.tasks.dataset import _read_hub
from learner.tasks.files import _json_values, read_file
from learner.tasks.rewards import exact_match

REWARD = ["learner.tasks.rewards:exact_match"]
#: Texts that a reader of tables takes for something else.
TEXTS = [
    *("2024-01-01", "2024-01-01T10:00:00Z", "10:30", "007", "1.50", "1e5", "-0", "123456789012345678901234567890"),
    *("", " ", "NA", "null", "None", "nan", "NaN", "inf", "true", "False", "[1]", '{"a": 1}', '"', " 7 ", "\u2028"),
]
#: Numbers and others that a column of one type would change.
VALUES: dict[str, list[Any]] = {
    "large": [2**53 + 1, 2**63 - 1],
    "larger": [2**63, -(2**70)],
    "mixed": [1, 1.0],
    "with_null": [3, None],
    "flags": [True, 1],
    "floats": [0.1, 1e-300],
    "digits": [0.10000000000000001, 1.7976931348623157e308],
    "lists": [[1, 2.0, "3", None], []],
    "dicts": [{"a": None}, {"b": {"c": 2**53 + 1}}],
    "either": ["7", 7],
    "nothing": [None, None],
}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def same(found: Any, expected: Any) -> bool:
    """Equal, and of the same types: 1, 1.0 and True are different."""
    return json.dumps(found) == json.dumps(expected)


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """Every rank reads it, and it may be larger than what they can hold several times."""
    read: list[int] = []

    def lines(*given: str) -> Iterator[str]:
        for number, line in enumerate(given):
            read.append(number)
            yield line

    values = _json_values(lines('{"x": 1}\n', '{"x":\n', ' 2} {"x": 3}', ' {"x": 4}\n', "[\n", "5\n", "]\n"), tmp_path)
    assert next(values) == {"x": 1}
    assert read == [0]
    assert [value if isinstance(value, list) else value["x"] for value in values] == [2, 3, 4, [5]]


def test_a_long_value_is_not_tried_with_each_of_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    decode = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, at: int) -> Any:
        tried.append(at)
        return decode(self, text, at)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    rows = [{"x": number} for number in range(2000)]
    assert read_file(write(tmp_path / "rows.json", json.dumps(rows, indent=1)))["x"] == list(range(2000))
    assert len(tried) < 30


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz"])
def test_text_stays_text(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"Question {i}", "answer": text} for i, text in enumerate(TEXTS)]
    if kind.startswith("json"):
        text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "\t" if kind == "tsv" else ","
        quoted = ['"' + row["answer"].replace('"', '""') + '"' for row in rows]
        text = f"prompt{mark}answer\n" + "".join(f"{r['prompt']}{mark}{q}\n" for r, q in zip(rows, quoted, strict=True))
    path = write(tmp_path / f"rows.{kind}", gzip.compress(text.encode()) if kind.endswith("gz") else text)
    assert list(read_file(path)["answer"]) == TEXTS
    task = load_task(str(path), eval_size=4, reward_specs=REWARD)
    for part in (task.train, task.eval):
        said = [[{"role": "assistant", "content": row["answer"]}] for row in part]
        assert exact_match(prompts=[], completions=said, answer=[row["answer"] for row in part]) == [1.0] * len(part)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_column_of_one_kind_of_text_stays_text(tmp_path: Path, kind: str) -> None:
    """A reader that guesses makes dates of a column of dates."""
    rows = [{"prompt": f"Question {i}"} | {f"column {j}": text for j, text in enumerate(TEXTS)} for i in range(2)]
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    assert list(read_file(write(tmp_path / f"rows.{kind}", text))) == rows


def test_unquoted_csv_fields_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "prompt,answer\na,007\nb,1.50\nc,2024-01-01\nd,\ne,True\nf,NA\n")
    assert list(read_file(path)["answer"]) == ["007", "1.50", "2024-01-01", "", "True", "NA"]


def test_text_reaches_templates(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,answer\n" + "".join(f"00{i},{i}.50\n" for i in range(4)))
    style = {"prompt_template": "Number {id}:", "prompt_format": "raw"}
    task = load_task(str(path), eval_size=1, reward_specs=REWARD, task_args=style)
    assert {*task.train["prompt"], *task.eval["prompt"]} == {f"Number 00{i}:" for i in range(4)}


@pytest.mark.parametrize("lacking", [{"unit": None}, {}])
@pytest.mark.parametrize("field", ["unit", "unit[of]", "facts[unit]"])
def test_templates_do_not_ask_for_none(tmp_path: Path, lacking: dict[str, Any], field: str) -> None:
    rows = [{"q": f"w{i}", "unit": {"of": None if i == 2 else "m"}, "facts": {"unit": None}} for i in range(4)]
    if field == "unit":
        rows[2] = {"q": "w2", **lacking}
    elif field == "facts[unit]":
        rows[0]["facts"] = rows[1]["facts"] = {"unit": "m"}
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    style = {"prompt_template": f"{{q}} in {{{field}}}?"}
    with pytest.raises(TaskError, match=re.escape(f"rows.jsonl, row 3: prompt_template has a field {{{field}}}, and")):
        load_task(str(path), eval_size=1, reward_specs=REWARD, task_args=style)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_values_stay_what_they_are(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"Question {i}", **{name: values[i] for name, values in VALUES.items()}} for i in range(2)]
    text = json.dumps(rows) if kind == "json" else "\n\n".join(map(json.dumps, rows))
    found = read_file(write(tmp_path / f"rows.{kind}", "\ufeff" + text))
    assert same(list(found), rows)
    shuffled = concatenate_datasets([found.shuffle(seed=1), found.select([1])])
    assert same(sorted(shuffled, key=lambda row: row["prompt"]), [rows[0], rows[1], rows[1]])
    assert same(list(pickle.loads(pickle.dumps(found))), rows)  # noqa: S301 - made here


def test_a_key_that_a_row_lacks_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"prompt": "a"}\n{"prompt": "b", "answer": "1"}\n{"other": [2]}\n')
    assert list(read_file(path)) == [
        {"prompt": "a", "answer": None, "other": None},
        {"prompt": "b", "answer": "1", "other": None},
        {"prompt": None, "answer": None, "other": [2]},
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"prompt": "a", "x": 1}\n{"prompt": "b", "x": 1e400}', "row 2, column 'x': the number 1e400"),
        ("r.jsonl", '{"prompt": "a", "x": 1e-400}', "row 1, column 'x': the number 1e-400"),
        ("r.jsonl", '{"x": 1e99999999999999999999}', "row 1, column 'x'"),
        ("r.jsonl", '{"x": 0.' + "0" * 50 + "1e-99999999999999999999}", "row 1, column 'x'"),
        (
            "r.json",
            '[{"x": 1}, {"x": [{"y": 3.14159265358979323846}]}]',
            "row 2, column 'x': the number 3.14159265358979",
        ),
        ("r.jsonl", '{"x": ' + "7" * 5000 + "}", "row 1, column 'x': an integer of 5000 digits"),
        ("r.jsonl", '{"x": {"a": 1, "a": 2}}', "row 1, column 'x': an object has the key 'a' twice"),
        ("r.jsonl", '{"x": 1, "x": 2}', "row 1: an object has the key 'x' twice"),
        ("r.jsonl", '{"x": "fine"}\n{"x": "\\ud800"}', "row 2, column 'x': half of a surrogate pair"),
        ("r.jsonl", '{"x": [1]}\n{"x": {"y": "\\udfff"}}', "row 2, column 'x': half of a surrogate pair"),
        ("r.jsonl", '{"x": 1}\n{"x": 2', "row 2, is not JSON: .*line 2"),
        ("r.jsonl", '{"x": 1}\n{"x":\n 2} {"x": 3} {"x"\n: 2\n,}\n{"x": 4}', "row 4, is not JSON: .*line 5"),
        ("r.jsonl", '{"x": 1}\n[1]', r"row 2, must be an object with a value for each column, not \[1\]"),
        ("r.json", "[" * 100_000, "row 1, is not JSON"),
        ("r.json", '["a", "b"]', "row 1, must be an object"),
        ("r.json", "[]", "has no rows"),
        ("r.jsonl", b'{"x": "a"}\n{"x": "\xff"}', "not UTF-8 text: line 2"),
        ("r.jsonl", b'{"x": "a"}\n' * 5000 + b'{"x": "\xff"}', "not UTF-8 text: line 5001"),
        ("r.jsonl.gz", b"\x1f\x8b\x08" + bytes(5) + b"\x02\xff" + b"\xff" * 30, "cannot be read: .*invalid block type"),
        ("r.csv", "prompt,answer\na,1\nb,1,2\n", "row 2, has 3 fields for 2 columns"),
        ("r.csv", "prompt,answer\na,1\nb\n", "row 2, has 1 fields for 2 columns"),
        ("r.csv", 'prompt,answer\na,"1" 2\n', "row 1, line 2"),
        ("r.csv", 'prompt,answer\na,"1\n', "row 1, line 2: unexpected end of data"),
        ("r.csv", 'prompt,answer\na,1\nb,"1" 2\n', "row 2, line 3"),
        ("r.csv", "answer,answer\na,1\n", "two columns 'answer'"),
        ("r.csv", "", "has no rows"),
        ("r.jsonl.gz", b"\x1f\x8bno", "cannot be read"),
        ("r.parquet", "no", "cannot be read"),
        ("r.txt", "a", "a task file ends in .jsonl"),
        ("r.parquet.gz", "a", "a task file ends in .jsonl"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_row_and_column(tmp_path: Path, name: str, text: Any, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(TaskError, match=rf"(?s){name}.*{message}") as refused:
        load_task(str(path), reward_specs=REWARD)
    assert "\n" not in refused.value.message


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


#: Messages of different keys, and a None that a row has itself.
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Weather?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Oslo", day=None)]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ],
    [
        {"role": "assistant", "content": "", "tool_calls": [call("sum", a=1, b=2.0)]},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ],
]


def test_messages_keep_their_own_keys(tmp_path: Path) -> None:
    rows = [{"prompt": chat, "meta": {str(i): i}} for i, chat in enumerate(CHATS)]
    path = write(tmp_path / "chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(path), eval_size=1, reward_specs=REWARD)
    found = sorted([*task.train, *task.eval], key=lambda row: json.dumps(row["meta"]))
    assert same([{"prompt": row["prompt"], "meta": row["meta"]} for row in found], rows)


class Shows:
    """A tokenizer whose chat template shows every key of every message."""

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return json.dumps(messages)


def test_chat_templates_see_what_the_row_says(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", "".join(json.dumps({"prompt": chat}) + "\n" for chat in CHATS))
    task = load_task(str(path), eval_size=1, reward_specs=REWARD)
    for row in [*task.train, *task.eval]:
        shown = apply_chat_template({"prompt": row["prompt"]}, Shows())["prompt"]
        assert json.loads(shown) in CHATS


def test_messages_of_a_parquet_file_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    """Arrow's format itself cannot tell absent keys from None: what is None is not shown."""
    path = tmp_path / "chats.parquet"
    Dataset.from_list([{"prompt": chat[:2], "when": 7} for chat in CHATS[:2]]).to_parquet(path)
    task = load_task(str(path), eval_size=1, reward_specs=REWARD)
    prompts = sorted((row["prompt"] for row in [*task.train, *task.eval]), key=len)
    shown = {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Oslo")]}
    assert prompts == [CHATS[0], [CHATS[1][0], shown]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "row 3: the prompt is empty"),
        ({"prompt": " \n"}, "row 3: the prompt is empty"),
        ({"prompt": None}, "row 3: a prompt must be text or a list of messages .*, not None"),
        ({"prompt": 7}, "row 3: a prompt must be text or a list of messages .*, not 7"),
        ({"prompt": []}, r"row 3: a prompt must be text or a list of messages .*, not \[\]"),
        ({"prompt": CHATS[0]}, "row 3: some prompts are text and others are chat messages"),
    ],
)
def test_prompts_are_refused_by_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, row, {"prompt": "d"}]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=f"rows.jsonl, {message}"):
        load_task(str(path), eval_size=1, reward_specs=REWARD, task_args={"prompt_format": "raw"})


@pytest.mark.parametrize(
    "name",
    ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"],
)
def test_columns_named_like_arguments_of_rewards_are_refused(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"w{i}", name: "w1"} for i in range(4)]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=f"rows.jsonl has a column '{name}'.*rename"):
        load_task(str(path), eval_size=1, reward_specs=REWARD)
    clean = write(tmp_path / "clean.jsonl", "".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(4)))
    with pytest.raises(TaskError, match=f"rows.jsonl has a column '{name}'"):
        load_task(str(clean), eval_dataset=str(path), reward_specs=REWARD)


@pytest.mark.parametrize("name", ["image", "images"])
def test_image_columns_are_for_images(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"w{i}", name: None} for i in range(4)]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_task(str(path), eval_size=1, reward_specs=REWARD).train.column_names == ["prompt"]
    rows[2][name] = "cat.png"
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=f"row 3, column '{name}': 'cat.png' is not an image"):
        load_task(str(path), eval_size=1, reward_specs=REWARD)


def test_datasets_of_the_hub(tmp_path: Path) -> None:
    """`datasets` loads a folder as it loads a repository of the hub."""
    (tmp_path / "csv").mkdir()
    write(tmp_path / "csv" / "train.csv", "prompt,answer\na,007\nb,\n")
    assert list(_read_hub(str(tmp_path / "csv"), None, "train")["answer"]) == ["007", ""]
    (tmp_path / "json").mkdir()
    rows = '{"prompt": "a", "answer": "2024-01-01"}\n{"prompt": "b", "answer": "2024-01-02"}\n'
    write(tmp_path / "json" / "train.jsonl", rows)
    with pytest.raises(TaskError, match="column 'answer': datasets reads its text as dates"):
        _read_hub(str(tmp_path / "json"), None, "train")


@pytest.mark.parametrize("folder", ["run[1]", "run?", "run*", "run[!2]"])
def test_a_path_is_no_pattern(tmp_path: Path, folder: str) -> None:
    for name in ("run1", folder):
        (tmp_path / name).mkdir()
        Dataset.from_dict({"prompt": [f"{name} {i}" for i in range(4)]}).to_parquet(tmp_path / name / "[x].parquet")
    assert read_file(tmp_path / folder / "[x].parquet")["prompt"][0] == f"{folder} 0"
