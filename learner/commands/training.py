"""`learner train`, as far as it goes without TRL: its help, and options, files and models that do not exist.

The names of TRL's options are read from its source: importing it takes longer than anyone waits for a typo.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from learner.commands.config_file import SECTIONS, read_config_file
from learner.commands.flags import is_none
from learner.config import LearnerConfig
from learner.foreign_options import REFUSED, unknown_option
from learner.tasks.file_kinds import FILE_KINDS, kind_of
from learner.tasks.imports import is_importable
from learner.trainer.without_vllm import without_vllm
from learner.utils.logs import show_messages
from learner.utils.waits import waiting
from shared.collections_off import without_collections
from shared.errors import InvalidRequest
from shared.messages import stray_word
from shared.model_files import check_model_exists

#: What is set first.
FIRST = {
    "rollout_url": "URL of the rollout server, e.g. http://127.0.0.1:8000; several may be given (required).",
    "task": "reasoning_gym:NAME, a JSONL file, a hub dataset, or module:object (required).",
    "reward_funcs": "Reward functions, module:function. Default: the task's own.",
    "model_name_or_path": "The base model, a directory or a name on the hub; the same as the server's (required).",
    "output_dir": "Where checkpoints, the run's page and the adapter go; the same command goes on from there.",
    "max_steps": "Optimizer steps; -1: as many as num_train_epochs has.",
    "learning_rate": "At its highest; for LoRA 1e-5 to 1e-4 is usual.",
    "lora_r": "Rank of the adapter; the server's --max-lora-rank must not be less.",
    "num_generations": "Completions of each prompt, which are compared with each other.",
    "max_completion_length": "Tokens of a completion at most.",
}
_DATACLASSES = {  # where their source is
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
}
_GROUPS = {
    "Agents": r"agent",
    "Task and rewards": r"task|train_size|eval_|prompt_column|reward|tools|environment|(drop_)?degenerate",
    "Servers": r"rollout_url|token_file|ca_file|.*timeout_s|run_id|takeover|allow_|share_gpu",
    "Weights and their proof": r"init_adapter|lora_kwargs|save_merged|proof|transport|in_flight|max_staleness",
}
#: Options that name objects of the user's as module:object.
_IMPORTED = ("reward_funcs", "tools", "environment", "agent")
_WIDTH = 110
_UNKNOWN = object()


@dataclass(frozen=True)
class Option:
    """An option of `learner train`: `default` is `_UNKNOWN` where the source does not say it."""

    name: str
    group: str
    default: Any = None
    text: str = ""


@cache
def options() -> Mapping[str, Option]:
    """Return all options by name; ours come before TRL's."""
    found = {field.name: _own(field) for field in dataclasses.fields(LearnerConfig)}
    for name, (package, file) in _DATACLASSES.items():
        group = {"ModelConfig": "TRL's ModelConfig", "TrainingArguments": "transformers' TrainingArguments"}
        for option in _read_dataclass(name, package, file, group.get(name, "TRL's GRPOConfig")):
            found.setdefault(option.name, option)
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    if "--help-all" in argv:
        from learner.commands.options import OptionParser

        print(OptionParser().format_help())
        return 0
    if {"-h", "--help"}.intersection(argv):
        print(help_text())
        return 0
    check(argv)
    is_main = os.environ.get("RANK", "0") == "0"
    show_messages(is_main=is_main)
    with waiting("PyTorch, transformers and TRL to be imported"), without_collections(), without_vllm():
        from learner.commands import train
    return train.main(argv)


def check(argv: Sequence[str]) -> None:
    """Check what can be checked without TRL.

    Raises:
        InvalidRequest: see `read_options`; or the model, the task's file, or a module of the user's is not there.
    """
    given = read_options(argv)
    check_files(given)
    if model := given.get("model_name_or_path"):
        try:
            check_model_exists(str(model), given.get("model_revision"))
        except InvalidRequest as error:
            raise InvalidRequest(f"model_name_or_path: {error.message}") from error


def check_files(given: Mapping[str, Any]) -> None:
    """Raise `invalid_request` where the file of a task, or the module of a function, is not there; imports neither."""
    for name in ("task", "eval_dataset"):
        path = Path(str(given.get(name) or "")).expanduser()
        if kind_of(path) in FILE_KINDS and not path.is_file():
            raise InvalidRequest(f"{name}: there is no file {path} in {Path.cwd()}")
    for name, word in named_objects(given):
        module = word.partition(":")[0]
        if re.fullmatch(r"\w+:\w+", word) and not is_importable(module):  # a package would be imported
            raise InvalidRequest(f"{name}: there is no module {module} for {word} in {Path.cwd()}, nor installed")


def named_objects(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each object of the user's that an option names, as (option, module:object)."""
    for name in _IMPORTED:
        value = given.get(name) or ()
        words = value.split() if isinstance(value, str) else value
        if all(isinstance(word, str) for word in words):  # else the parser says what is wrong with it
            yield from ((name, word) for word in words)


def read_options(argv: Sequence[str]) -> dict[str, Any]:
    """Return the options on a command line, and in the files of its `--config`, by name and as they were written.

    `none` and `null` are None, as in a file.

    Raises:
        InvalidRequest: an option that does not exist, or would have no effect, with what to write instead; or a file
            that cannot be read.
    """
    known, files, given = options(), dict[str, Any](), dict[str, Any]()
    if argv and not re.match(r"--[A-Za-z]", argv[0]):
        if not argv[0].startswith("-"):
            raise InvalidRequest(stray_word(argv[0], ["--config"]))
        raise InvalidRequest(f"there is no {argv[0]}: options are written as --NAME VALUE")
    for flag, words in _flags(argv):
        name, value = flag.replace("-", "_"), " ".join(words)
        if name == "config":
            files |= _read(value, known)
        elif name not in known and name.removeprefix("no_") not in known:
            raise InvalidRequest(unknown_option(flag, value, known))
        else:
            _refuse(name, value, f"--{name} {value}")
            one = None if is_none(value) else value or "true"
            given[name] = [*given.get(name, ()), *words] if name == "rollout_url" else one
    return files | given


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag without its dashes, and the words up to the next one."""
    at = [index for index, word in enumerate(argv) if re.match(r"--[A-Za-z]", word)]
    for index, end in pairwise([*at, len(argv)]):
        flag, equals, value = argv[index].removeprefix("--").partition("=")
        yield flag, [*([value] if equals else []), *argv[index + 1 : end]]


def _read(path: str, known: Mapping[str, Option]) -> dict[str, Any]:
    values = {name: value for name, value in read_config_file(path).items() if name not in SECTIONS}
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"--config {path}: {unknown_option(name, value, known, flag=False)}")
        _refuse(name, value, f"--config {path}: {name} {value}")
    return values


def _refuse(name: str, value: Any, written: str) -> None:
    """Refuse an option that would have no effect: of a vLLM that TRL starts itself, or of no vLLM at all."""
    nothing = is_none(value) or str(value).lower() == "false"
    if name == "use_vllm" and nothing:
        raise InvalidRequest(f"{written}: completions always come from a rollout server's vLLM; leave it out")
    if name in REFUSED and not nothing and (name, value) != ("vllm_mode", "server"):
        raise InvalidRequest(f"{written} has no effect here: {REFUSED[name]}")


def help_text() -> str:
    """Return the options that are set first, with their help, and all others by name."""
    known = options()
    lines = [
        "usage: learner train [--config FILE.yaml ...] [--OPTION VALUE ...]",
        "",
        "GRPO on a LoRA adapter, with rollouts from rollout servers. What is set first:",
        "",
    ]
    for name, text in FIRST.items():
        default = known[name].default
        text += "" if default in (None, _UNKNOWN) or "required" in text else f" Default: {default}."
        lines += textwrap.wrap(text, _WIDTH, initial_indent=f"  --{name:<23} ", subsequent_indent=" " * 28)
    groups: dict[str, list[str]] = {}
    for option in known.values():
        if option.name not in FIRST:
            groups.setdefault(option.group, []).append(f"--{option.name}")
    for group, names in groups.items():
        wrapped = textwrap.wrap(" ".join(names), _WIDTH, break_on_hyphens=False)
        lines += ["", f"{group}:", *(f"  {line}" for line in wrapped)]
    return "\n".join(
        [
            *lines,
            "",
            "--help-all explains each of them. A YAML file holds them as `option: value`; recipes/ has examples.",
            "`learner doctor` with the same options says what will not work. docs/from-unsloth.md and docs/from-trl.md",
            "show their settings beside ours.",
        ]
    )


def _own(field: dataclasses.Field[Any]) -> Option:
    group = next((g for g, names in _GROUPS.items() if re.match(names, field.name)), "Training and monitoring")
    return Option(field.name, group, field.default, field.metadata["help"])


def _read_dataclass(name: str, package: str, file: str, group: str) -> list[Option]:
    """Return the fields of a dataclass, read from the source of an installed package; none if it is not there."""
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0], file) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        return []
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    body = next((node.body for node in classes if node.name == name), [])
    return [
        _option(node.target.id, group, node.value)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    ]


def _option(name: str, group: str, value: ast.expr | None) -> Option:
    if not isinstance(value, ast.Call):
        return Option(name, group, _literal(value))
    words = {keyword.arg: keyword.value for keyword in value.keywords}
    texts = words.get("metadata")
    parts = zip(texts.keys, texts.values, strict=True) if isinstance(texts, ast.Dict) else ()
    text = next((_literal(node) for key, node in parts if _literal(key) == "help"), "")
    default = _literal(words["default"]) if "default" in words else _UNKNOWN
    return Option(name, group, default, text if isinstance(text, str) else "")


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return _UNKNOWN
