"""Tasks from real generators and real files: who sees which question, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.tasks import Task, TaskError, load_task
from learner.tasks.imports import import_object
from learner.tasks.prompts import question_key
from learner.utils.wording import option
from tests.support.chats import said

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 different questions
SUMS = "reasoning_gym:chain_sum"


def keys(rows: Any) -> set[str]:
    return {question_key(prompt) for prompt in rows["prompt"]}


def score(task: Task, rows: list[dict[str, Any]], *texts: str) -> list[float]:
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return task.reward_funcs[0](prompts=[row["prompt"] for row in rows], completions=said(*texts), **columns)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """40 questions about squares, the first ten of them twice, the second time with other white space."""
    path = tmp_path / "squares.jsonl"
    texts = [f"What is {i} squared?" for i in range(40)] + [f"What is  {i}\nsquared?" for i in range(10)]
    path.write_text(
        "".join(json.dumps({"prompt": t, "answer": str((i % 40) ** 2)}) + "\n" for i, t in enumerate(texts))
    )
    return path


# reasoning-gym


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_a_small_task_is_split_without_overlap(seed: int) -> None:
    # The generator draws with replacement from 200 questions, so 128 + 500 draws would overlap many times over.
    task = load_task(SUMS, task_args=ONE_DIGIT, eval_size=128, train_size=500, seed=seed)
    assert len(keys(task.eval)) == len(task.eval) == 128
    assert len(task.train) == 500
    assert len(keys(task.train)) == 72, "all that are left"
    assert not keys(task.eval) & keys(task.train)


def test_held_out_questions_do_not_depend_on_the_training_seed() -> None:
    args = {"min_terms": 2, "max_terms": 3}
    one, two = (load_task(SUMS, task_args=args, eval_size=64, train_size=300, seed=s) for s in (1, 2))
    again = load_task(SUMS, task_args=args, eval_size=64, train_size=300, seed=1)
    assert one.eval["question"] == two.eval["question"]
    assert one.train["question"] == again.train["question"]
    assert not keys(one.train) & keys(two.eval)
    shared_by_both = keys(one.train) & keys(two.train)
    assert len(shared_by_both) < 30, "another seed trains on other questions, not on the same ones shifted by one"


def test_fewer_held_out_questions_are_the_first_of_more() -> None:
    few, many = (load_task(SUMS, eval_size=n, train_size=16) for n in (8, 32))
    assert many.eval["question"][:8] == few.eval["question"]


@pytest.mark.parametrize("eval_size", [190, 200, 250])
def test_a_task_that_is_too_small_says_so(eval_size: int) -> None:
    with pytest.raises(TaskError, match="different questions: too few") as refused:
        load_task(SUMS, task_args=ONE_DIGIT, eval_size=eval_size)
    assert "about 200" in str(refused.value)


def test_answers_are_scored_by_the_task_itself() -> None:
    task = load_task(SUMS, task_args=ONE_DIGIT, eval_size=4, train_size=16)
    rows = [task.eval[i] for i in range(4)]
    right = [row["answer"] for row in rows]
    assert score(task, rows, *(f"So that makes {a}.0, I think." for a in right)) == [1.0] * 4
    assert score(task, rows, *(f"{a} or rather {int(a) + 1}" for a in right)) == [0.0] * 4
    assert score(task, rows, "", "no idea", "-", "<answer></answer>") == [0.0] * 4
    assert task.reward_funcs[0].__name__ == "chain_sum"


def test_partial_credit_can_be_refused() -> None:
    tasks = [
        load_task(SUMS, task_args=ONE_DIGIT | more, eval_size=4, train_size=16)
        for more in ({}, {"partial_credit": False})
    ]
    rows = [tasks[0].eval[i] for i in range(4)]
    longer = [row["answer"] + "77" for row in rows]  # contains the right answer, and reasoning-gym pays for that
    assert min(score(tasks[0], rows, *longer)) > 0.0
    assert score(tasks[1], rows, *longer) == [0.0] * 4
    assert score(tasks[1], rows, *(row["answer"] for row in rows)) == [1.0] * 4


def test_rewards_find_their_entry_in_training_and_evaluation_alike() -> None:
    # countdown has many right answers: only the entry's own metadata can tell.
    task = load_task("reasoning_gym:countdown", task_args={"answer": "tag"}, eval_size=4, train_size=16)
    for part in (task.eval, task.train):
        rows = [part[i] for i in range(4)]
        assert score(task, rows, *(f"<answer>{row['answer']}</answer>" for row in rows)) == [1.0] * 4
        assert max(score(task, rows, *(f"<answer>{row['answer']} + 1</answer>" for row in rows))) < 1.0


def test_prompt_options() -> None:
    args = ONE_DIGIT | {"system_prompt": "Only the number.", "prompt_template": "{metadata[expression]} ="}
    prompt = load_task(SUMS, task_args=args, eval_size=4, train_size=16).eval[0]["prompt"]
    assert [m["role"] for m in prompt] == ["system", "user"]
    assert prompt[0]["content"] == "Only the number."
    assert len(prompt[1]["content"]) == len("1 + 2 =")
    raw = load_task(SUMS, task_args=ONE_DIGIT | {"prompt_format": "raw"}, eval_size=4, train_size=16)
    assert raw.train[0]["prompt"] == raw.train[0]["question"]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("chain_sums", {}, "did you mean chain_sum"),
        ("chain_sum", {"max_terns": 2}, "no argument max_terns; it has min_terms"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"seed": 3}, "use --seed"),
        ("chain_sum", {"answer": "first"}, "last_number, tag, whole"),
        ("chain_sum", {"answer": ["tag"]}, "last_number, tag, whole"),
        ("chain_sum", {"partial_credit": "false"}, "partial_credit 'false' is neither true nor false"),
        ("chain_sum", {"min_terms": 2.5}, "makes no question: ValueError"),
        ("chain_sum", {"system_prompt": 5}, "system_prompt 5 is not text"),
        ("chain_sum", {"prompt_template": ["{question}"]}, "prompt_template .* is not text"),
        ("chain_sum", {"prompt_format": "html"}, "chat, raw"),
        ("chain_sum", {"prompt_template": "{expression}"}, "does not fit the rows, whose fields are question, answer"),
    ],
)
def test_wrong_generator_arguments(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(f"reasoning_gym:{name}", task_args=args)


def test_without_pycosat_only_the_puzzle_that_needs_it_fails() -> None:
    program = """
import sys
class Block:
    def find_spec(self, name, *rest):
        if name == "pycosat": raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
import importlib.util
importlib.util.find_spec = lambda name, *rest, real=importlib.util.find_spec: None if name == "pycosat" else real(name)
from learner.tasks import load_task, TaskError
print(len(load_task("reasoning_gym:chain_sum", eval_size=2, train_size=2).eval))
try: load_task("reasoning_gym:zebra_puzzles", eval_size=2, train_size=2)
except TaskError as error: print(error.message)
from sympy.logic.inference import satisfiable; from sympy.abc import x
print(satisfiable(x), "pycosat" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    size, puzzle, sympy = ran.stdout.splitlines()
    assert (size, sympy) == ("2", "{x: True} False")
    assert "pip install pycosat" in puzzle


# files and datasets

REWARD = ["learner.tasks.rewards:exact_match"]


def test_a_file_is_split_by_question(questions: Path) -> None:
    task = load_task(str(questions), eval_size=20, reward_specs=REWARD, seed=3)
    assert len(task.eval) == len(keys(task.eval)) == 20
    assert not keys(task.eval) & keys(task.train)
    assert len(keys(task.train)) == 20
    both_sides = len(task.train) + len(task.eval)
    assert 40 < both_sides < 50, "a question that occurs twice is asked once in evaluation, twice in training"
    assert task.train[0]["prompt"][0]["role"] == "user"
    assert load_task(str(questions), eval_size=20, reward_specs=REWARD, seed=4).eval["prompt"] == task.eval["prompt"]


def test_a_question_may_stand_in_a_system_message_alone(tmp_path: Path) -> None:
    rows = [[{"role": "system", "content": f"Continue from {i}."}] for i in range(6)]
    for name, some in (("all.jsonl", rows), ("few.jsonl", rows[:2])):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in some))
    split = load_task(str(tmp_path / "all.jsonl"), eval_size=2, reward_specs=REWARD)
    assert (len(split.train), len(split.eval)) == (4, 2)
    given = load_task(str(tmp_path / "all.jsonl"), eval_dataset=str(tmp_path / "few.jsonl"), reward_specs=REWARD)
    assert sorted(given.train["prompt"], key=str) == rows[2:]


def test_a_separate_evaluation_set_is_kept_out_of_training(questions: Path, tmp_path: Path, caplog) -> None:
    evaluation = tmp_path / "eval.csv"
    evaluation.write_text("prompt,answer\nWhat is 3 squared?,9\nWhat is 77 squared?,5929\n")
    task = load_task(str(questions), eval_dataset=str(evaluation), reward_specs=REWARD)
    assert len(task.eval) == 2
    assert len(task.train) == 48, "both rows that ask for 3 squared are gone"
    assert not keys(task.eval) & keys(task.train)
    assert "left out 2 training rows" in caplog.text


def test_a_separate_evaluation_set_is_used_whole_unless_a_size_is_given(questions: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("".join(f'{{"prompt": "What is {i} cubed?", "answer": "1"}}\n' for i in range(200)))
    sizes = [
        len(load_task(str(questions), eval_dataset=str(evaluation), eval_size=size, reward_specs=REWARD).eval)
        for size in (None, 128, 0)
    ]
    assert sizes == [200, 128, 0]


def test_file_formats_and_columns(questions: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in questions.read_text().splitlines()][:40]
    (tmp_path / "rows.json").write_text(json.dumps([{"question": r["prompt"], "answer": r["answer"]} for r in rows]))
    options: dict[str, Any] = {"eval_size": 4, "reward_specs": REWARD, "prompt_column": "question"}
    task = load_task(str(tmp_path / "rows.json"), task_args={"system_prompt": "Be brief."}, **options)
    assert [m["role"] for m in task.train[0]["prompt"]] == ["system", "user"]
    assert task.train[0]["question"] in task.train[0]["prompt"][1]["content"], "rewards may read the column too"
    task.train.remove_columns("prompt").to_parquet(tmp_path / "rows.parquet")
    raw = load_task(str(tmp_path / "rows.parquet"), task_args={"prompt_format": "raw"}, train_size=5, **options)
    assert raw.train[0]["prompt"] == raw.train[0]["question"]
    assert len(raw.train) == 5


def test_a_file_may_hold_prompts_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(6)))
    task = load_task(str(path), eval_size=2, reward_specs=REWARD)
    assert len(task.train) == 4
    assert task.train.column_names == ["prompt"]


def test_a_column_that_rewards_do_not_get_is_named_once(tmp_path: Path, caplog) -> None:
    path, others = tmp_path / "train.jsonl", tmp_path / "others.jsonl"
    for file, first in ((path, 0), (others, 6)):
        rows = [{"prompt": f"Question {first + i}", "completion": "own"} for i in range(6)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_task(str(path), eval_dataset=str(others), reward_specs=REWARD)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} and {others}: reward functions do not get the column 'completion'")
    load_task(str(path), eval_dataset=str(path), eval_size=2, reward_specs=REWARD)
    assert sum("completion" in record.getMessage() for record in caplog.records) == 2


def test_chat_rows_stay_chat(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [[{"role": "system", "content": "Own."}, {"role": "user", "content": f"Question {i}"}] for i in range(6)]
    path.write_text("".join(json.dumps({"prompt": t, "answer": "x"}) + "\n" for t in turns))
    task = load_task(str(path), eval_size=2, reward_specs=REWARD, task_args={"system_prompt": "Other."})
    assert all(prompt[0] == {"role": "system", "content": "Own."} for prompt in task.train["prompt"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"spec": "."}, ". is a directory: name one .*parquet file in it, or module:object"),
        ({"spec": "no such dataset"}, "could not be loaded from the hub"),
        ({"prompt_column": "question"}, "no column 'question'; it has prompt, answer"),
        ({"reward_specs": None}, "needs a reward"),
        ({"reward_specs": ["score"]}, "a dataset has none"),
        ({"reward_specs": ["exact_match"]}, "not an import path"),
        ({"reward_specs": ["./my/rewards.py:f"]}, r"names a file: write my\.rewards:f"),
        ({"reward_specs": ["/my/rewards.py:f"]}, r"names a file: write rewards:f"),
        ({"reward_specs": ["no_such_module:f"]}, "no module 'no_such_module'"),
        ({"reward_specs": ["learner.tasks.rewards:nope"]}, "no 'nope' in learner.tasks.rewards; it has .*exact_match"),
        ({"reward_specs": ["sys:version"]}, "not a function"),
        ({"reward_specs": REWARD * 2}, "two rewards are called exact_match"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward weights for 1 rewards"),
        ({"eval_size": 40}, "40 different questions: too few"),
        ({"task_args": {"min_terms": 2}}, "no task argument min_terms"),
    ],
)
def test_wrong_dataset_options(changes: dict[str, Any], message: str, questions: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"spec": str(questions), "eval_size": 4, "reward_specs": REWARD} | changes
    with pytest.raises(TaskError, match=message):
        load_task(**options)


def test_a_module_that_ends_the_process_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a_lockstep_script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--own'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match="importing 'a_lockstep_script' failed: SystemExit: 2"):
        import_object("a_lockstep_script:agent")


def test_own_rewards_and_tasks_from_the_current_directory(questions: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_lockstep_module.py").write_text(
        "from learner.tasks import load_task\n"
        "def brevity(prompts, completions, **columns): return [-len(c[0]['content']) for c in completions]\n"
        f"def task(**options): return load_task({str(questions)!r}, **(options | {{'task_args': None}}))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    rewards = ["my_lockstep_module:brevity", "score"]
    task = load_task(SUMS, eval_size=2, train_size=2, reward_specs=rewards, reward_weights=[0.1, 1])
    assert [f.__name__ for f in task.reward_funcs] == ["brevity", "chain_sum"]
    assert task.reward_weights == [0.1, 1.0]
    own = load_task("my_lockstep_module:task", eval_size=4, reward_specs=["my_lockstep_module:brevity"])
    assert len(own.eval) == 4
    assert own.reward_funcs[0](prompts=[""], completions=said("four")) == [-4]
    with pytest.raises(TaskError, match=r"neither a learner\.tasks\.Task"):
        load_task("math:pi")


#: What each option is given as, and its name.
IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"reward_specs": REWARD}, "reward_funcs"),
    ({"reward_weights": [2.0]}, "reward_weights"),
    ({"train_size": 3}, "train_size"),
    ({"eval_size": 0}, "eval_size"),
    ({"task_args": {"foo": 1}}, "task_args"),
    ({"prompt_column": "q"}, "prompt_column"),
    ({"eval_dataset": "x.jsonl"}, "eval_dataset"),
    ({"eval_size": 4, "task_args": {"foo": 1}}, "task_args, eval_size"),
]


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch) -> Callable[[str], str]:
    """Writes `name` into a module, a task of two rows or a function that returns it; returns its import path."""

    def write(definition: str) -> str:
        (tmp_path / "a_lockstep_task.py").write_text(
            "from datasets import Dataset\nfrom learner.tasks import Task\n"
            "rows = Dataset.from_list([{'prompt': 'a'}, {'prompt': 'b'}])\n"
            f"fixed = Task('own', rows, rows, [len])\n{definition}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "a_lockstep_task", raising=False)
        return "a_lockstep_task:name"

    return write


@pytest.mark.parametrize(("options", "named"), IGNORED, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize(
    "definition",
    ["name = fixed", "def name(): return fixed", "def name(seed, **_rest): return fixed"],
    ids=["a task", "nothing", "the rest, unread"],
)
def test_options_that_a_task_does_not_look_at_are_refused(own_task, definition, options, named) -> None:
    spec, said = own_task(definition), ", ".join(map(option, named.split(", ")))
    with pytest.raises(TaskError, match=f"^{said}: the task {spec} does not look at it"):
        load_task(spec, **options)
    assert load_task(spec, seed=7, eval_size=128).name == "own"


def test_a_task_function_is_given_what_it_names_or_reads(own_task) -> None:
    spec = own_task("def name(eval_size, *, task_args): return Task(f'{eval_size}{task_args}', rows, rows, [len])")
    assert load_task(spec, eval_size=3).name == "3{}"
    spec = own_task("def name(**rest): return Task(' '.join(sorted(rest)), rows, rows, [len])")
    common = "eval_dataset eval_size prompt_column reward_specs reward_weights seed task_args train_size"
    assert load_task(spec, prompt_column="q").name == common


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ("def name(needed): return fixed", "TypeError: .*'needed'"),
        ("def name(task_args): return task_args['difficulty']", "KeyError: 'difficulty'"),
        ("def name(seed): raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_a_task_function_raises_is_named(own_task, definition, words) -> None:
    spec = own_task(definition)
    with pytest.raises(TaskError, match=f"calling '{spec}' failed: {words}"):
        load_task(spec)


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        (
            "name = Task('own', rows.rename_column('prompt', 'q'), rows, [len])",
            "training has no column 'prompt'; it has",
        ),
        ("name = Task('own', rows, rows.rename_column('prompt', 'q'), [len])", "evaluation has no column 'prompt'"),
        ("name = Task('own', list(rows), rows, [len])", "training is a list, not a dataset"),
        ("def name(): return Task('own', rows, {'hard': rows}, [len])", "evaluation is a dict, not a dataset"),
    ],
)
def test_a_task_has_datasets_with_prompts(own_task, definition, words) -> None:
    spec = own_task(definition)
    with pytest.raises(TaskError, match=f"^{spec}, {words}"):
        load_task(spec)


def test_what_may_pass_is_no_wrong_option(own_task) -> None:
    """The exit status of a wrong option tells a cluster not to try again."""
    with pytest.raises(ConnectionError, match="503"):
        load_task(own_task("def name(): raise ConnectionError('the hub answers 503')"))


@pytest.mark.parametrize("name", ["counting:circles", "guessing:numbers"])
def test_example_tasks_refuse_task_args_that_they_do_not_know(name: str) -> None:
    with pytest.raises(TaskError, match="no task argument mots; only most"):
        load_task(f"learner.tasks.examples.{name}", task_args={"mots": 3})


@pytest.mark.parametrize("content", [5, 0.5, True])
def test_content_that_is_no_text_is_refused_by_row(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "rows.jsonl"
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": content}]]
    path.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    with pytest.raises(TaskError, match=f"row 2: the content of a message is {content}: write text"):
        load_task(str(path), eval_size=0, reward_specs=REWARD)


def test_columns_that_rewards_do_not_get_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "prompt": "b", "completion": "c", "answer": "d"}\n')
    load_task(str(path), eval_size=0, reward_specs=REWARD, prompt_column="question")
    assert ["'completion'" in line or "'prompt'" in line for line in caplog.messages] == [True, True]


def test_a_prompt_column_is_not_for_generated_questions() -> None:
    with pytest.raises(TaskError, match="--prompt_column question is for files and datasets"):
        load_task(SUMS, eval_size=4, train_size=20, prompt_column="question")
