"""`learner init`: write a recipe for `learner up` and `learner train`, from flags, and from questions on a terminal."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from learner.commands.flags import Parser, either_spelling, number
from learner.utils.atomic import check_writable, write_atomically
from learner.utils.gpus import visible_gpus
from shared.errors import InvalidRequest
from shared.weights import served_rank

PLACES = {
    "own": "the rollout server has a GPU of its own",
    "shared": "server and learner take turns on one GPU",
    "cpu": "both run on the CPU",
}


@dataclass(frozen=True)
class Question:
    """One choice of a recipe: a flag, and what is asked where the flag is missing.

    Attributes:
        default: None: there is none, and an answer is needed.
        asked: whether it is asked at all, by the answers so far; the default counts otherwise.
        check: of an answer, as a `type` of argparse.
    """

    flag: str
    text: str
    default: Callable[[dict[str, Any]], Any] | None = None
    asked: Callable[[dict[str, Any]], bool] = lambda answers: True
    check: Callable[[str], Any] = str


def _something(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("there is nothing in it")
    return text


def _place(text: str) -> str:
    if text not in PLACES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PLACES)}")
    return text


def _rank(text: str) -> int:
    try:
        rank = int(number(int, 1)(text))
        served_rank(rank)
        return rank
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _needs_reward(answers: dict[str, Any]) -> bool:
    """Files and datasets have no score of their own."""
    task = str(answers["task"])
    return not task.startswith("reasoning_gym:") and (":" not in task or "/" in task)


QUESTIONS = (
    Question("model", "base model: a directory, or a name on the hub", check=_something),
    Question(
        "task",
        "task: reasoning_gym:NAME, a JSONL, CSV or Parquet file, a hub dataset, or module:object",
        check=_something,
    ),
    Question("prompt-column", "column with the prompt", lambda _: "prompt", _needs_reward),
    Question(
        "reward",
        "reward function, module:function",
        lambda answers: "learner.tasks.rewards:math_answer" if _needs_reward(answers) else "",
        _needs_reward,
    ),
    Question(
        "place",
        "where: " + "; ".join(f"{name} ({text})" for name, text in PLACES.items()),
        lambda _: ("cpu", "shared")[len(gpus)] if len(gpus := visible_gpus()) < 2 else "own",
        check=_place,
    ),
    Question("steps", "optimizer steps", lambda _: 200, check=number(int, 1)),
    Question("rank", "rank of the LoRA adapter", lambda _: 16, check=_rank),
    Question("max-completion-length", "tokens of a completion at most", lambda _: 256, check=number(int, 1)),
)


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    options = make_parser().parse_args(argv)
    out = Path(options.out)
    if out.exists() and not out.is_dir() and not options.force:
        raise InvalidRequest(f"--out {out} exists: give another name, or --force")
    check_writable(out, "--out")
    answers = _answers(vars(options), ask=sys.stdin.isatty() and not options.yes)
    write_atomically(out, recipe(answers, out))
    print(f"{out} is written; start it with: learner up --config {shlex.quote(str(out))}")
    return 0


def _answers(given: dict[str, Any], *, ask: bool) -> dict[str, Any]:
    """Return an answer to every question: that of its flag, of the user, or the default."""
    answers: dict[str, Any] = {}
    for question in QUESTIONS:
        name = question.flag.replace("-", "_")
        value = given[name]
        if value is None and question.default is not None:
            value = question.default(answers)
            if ask and question.asked(answers):
                value = _ask(question, value)
        elif value is None:
            if not ask:
                raise InvalidRequest(f"give --{question.flag}: {question.text}")
            value = _ask(question, None)
        answers[name] = value
    return answers


def _ask(question: Question, default: Any) -> Any:
    shown = "" if default in (None, "") else f" [{default}]"
    while True:
        try:
            text = input(f"{question.text}{shown}: ").strip()
        except EOFError:
            raise InvalidRequest(f"no answer: give --{question.flag}") from None
        if not text and default is not None:
            return default
        try:
            if text:
                return question.check(text)
        except argparse.ArgumentTypeError as error:
            print(error)


def recipe(answers: dict[str, Any], path: Path) -> str:
    """Return the recipe's text."""
    on_cpu = answers["place"] == "cpu"
    options: dict[str, Any] = {"model_name_or_path": answers["model"], "task": answers["task"]}
    if answers["prompt_column"] != "prompt" and not str(answers["task"]).startswith("reasoning_gym:"):
        options["prompt_column"] = answers["prompt_column"]
    if answers["reward"]:
        options["reward_funcs"] = [answers["reward"]]
    options["output_dir"] = f"runs/{path.stem}"
    precision = {"dtype": "float32", "use_cpu": True, "bf16": False} if on_cpu else {"dtype": "bfloat16", "bf16": True}
    if answers["place"] == "shared":
        precision["share_gpu"] = True
    lora = {"lora_r": answers["rank"], "lora_alpha": 2 * answers["rank"], "lora_target_modules": "all-linear"}
    batch = {
        "per_device_train_batch_size": 32 if on_cpu else 64,
        "num_generations": 8,
        "max_completion_length": answers["max_completion_length"],
        "temperature": 1.0,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_steps": answers["steps"],
        "beta": 0.0,
        "seed": 42,
    }
    keeping = {"logging_steps": 1, "save_steps": 50, "save_total_limit": 2, "report_to": "none"}
    server = {"enforce_eager": True, "max_num_seqs": 64} if on_cpu else {}
    sections: list[tuple[str, dict[str, Any]]] = [
        (
            f"Written by `learner init`. Both halves on this machine: learner up --config {shlex.quote(str(path))}\n"
            "# With rollout servers elsewhere: learner train --config FILE --rollout_url http://HOST:8000",
            options,
        ),
        (f"Where: {PLACES[answers['place']]}.", precision),
        ("The adapter.", lora),
        ("A batch has per_device_train_batch_size completions, num_generations of each question.", batch),
        ("The same command goes on from the last checkpoint.", keeping),
        ("Flags of rollout-server.", {"server": server} if server else {}),
    ]
    return "\n".join(f"# {comment}\n{_lines(values)}" for comment, values in sections if values)


def _lines(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of `learner init`."""
    parser = Parser(prog="learner init", description=__doc__)
    add = either_spelling(parser)
    add("--out", default="recipe.yaml", help="the file to write (default %(default)s)")
    for question in QUESTIONS:
        add(f"--{question.flag}", type=question.check, help=question.text)
    add("--yes", action="store_true", help="ask nothing: take the defaults")
    add("--force", action="store_true", help="replace a file that exists")
    return parser
