"""Recipes of `learner up`: files and flags, read into what the learner is told and what the server is."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.commands import training
from learner.commands.config_file import read_config_file
from learner.commands.flags import dtype_name, is_none, is_true
from learner.commands.up_output import say
from learner.config import LearnerConfig, json_object, slots_needed
from learner.foreign_options import server_flag
from learner.run_dir.lock import check_unused
from learner.utils.atomic import check_writable
from learner.utils.environment import variables_set
from shared.errors import InvalidRequest
from shared.messages import one_line
from shared.module_names import encoders
from shared.weights import served_rank

if TYPE_CHECKING:
    from learner.tasks import Task

#: Options of `learner train` that decide what a task's training data is.
_TASK_OPTIONS = ("task_args", "eval_size", "train_size", "prompt_column", "eval_dataset")
#: Adapter slots that a server has without `--slots-per-run`.
SLOTS = 2
#: Seconds for the hub's answer: what is asked for can be done without.
_HUB_S = 10.0

logger = logging.getLogger("lockstep.commands")

RECIPES = Path(__file__).parents[1] / "recipes"
#: Flags of a server that say where it listens.
ADDRESS = ("host", "port", "uds")


def find_recipe(name: str) -> Path:
    """Return the path of a recipe, given as a path or by the name of one of ours; raises `invalid_request`."""
    for path in (Path(name), RECIPES / Path(name).name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml")))
    raise InvalidRequest(f"--config {name}: no such file, and no recipe of that name; recipes are {known}")


@dataclass
class Recipe:
    """What was asked for, in files and flags.

    Attributes:
        options: flags of `learner up` alone.
        given: options of the learner; `server`: those of the server, by name with underscores.
        learner: flags of `learner train`.
        environment: of both.
    """

    options: argparse.Namespace
    given: dict[str, Any]
    server: dict[str, Any]
    learner: list[str]
    output_dir: Path
    environment: dict[str, str]

    @property
    def model(self) -> str:
        """The base model of both."""
        return str(self.given["model_name_or_path"])

    @property
    def wants_page(self) -> bool:
        """Whether the run's page is to be served, where nobody has said at which port."""
        wanted = is_true({"run_page": True, **self.given}, "run_page") and not is_true(self.given, "no_run_page")
        return wanted and "page_port" not in self.given

    def server_flags(self, **common: Any) -> list[str]:
        """Return the server's flags: those that follow from the learner's options, and its own.

        Args:
            common: more of the first kind.
        """
        common = _common(self.given) | common
        slots = _slots(self.given)
        if slots > SLOTS and self.server_flag("apply") != "merge":
            common["slots_per_run"] = slots
        if self._trains_text_of_more():
            say("the training data has no images: the server gets --language-model-only")
            common["language_model_only"] = True
        return [*_flags({**common, **self.server}), *(self.options.server_flags or ())]

    def _trains_text_of_more(self) -> bool:
        """Return whether the model sees or hears, and the data has nothing of that, as `learner train` will find it."""
        said = [name.replace("-", "_").removeprefix("no_") for name in self.server_flag_names()]
        if "language_model_only" in said:
            return False
        with variables_set(self.environment):
            return bool(_encoders(self.model, self.given.get("model_revision"))) and self._has_no_images()

    def _has_no_images(self) -> bool:
        say(f"loading the task, whose images decide what is served of {self.model}")
        try:
            from learner.tasks.columns import has_images

            return not has_images(_task(self.given).train)
        except (Exception, SystemExit) as error:  # of the user's own code, too: the learner will say what is wrong
            why = f"{type(error).__name__}: {one_line(error)}"
            say(f"whether it has images cannot be told ({why:.200}): the server gets ready for them")
            return False

    def server_flag_names(self) -> list[str]:
        """Return the names of the server's own flags, as they were written."""
        given = (word for word in self.options.server_flags or () if re.match(r"--?[a-zA-Z]", word))
        return [*self.server, *(word.lstrip("-").partition("=")[0] for word in given)]

    def server_flag(self, *names: str) -> Any:
        """Return the value of one of the server's own flags, given the names of one, with underscores; else None."""
        words = [re.sub(r"^-(?=[a-zA-Z])", "--", word) for word in self.options.server_flags or ()]
        written = (_values(words), self.server)
        return next((values[name] for values in written for name in names if name in values), None)

    def server_count(self, *names: str) -> int | None:
        """Return the value of such a flag as a number; raises `invalid_request` where it is none above 0."""
        if (value := self.server_flag(*names)) is None:
            return None
        if not str(value).isdecimal() or not int(value):
            raise InvalidRequest(f"server: {names[0]} {value!r}: give a whole number, at least 1")
        return int(value)


def read_recipe(options: argparse.Namespace, flags: Sequence[str]) -> Recipe:
    """Read the recipes of `--config`, and the flags of `learner train`, which count more.

    Args:
        options: flags of `learner up` alone.
        flags: the others.

    Raises:
        InvalidRequest: what `learner train` refuses before it imports TRL, or what the two have to share is missing.
    """
    files = [find_recipe(name) for name in options.config or ()]
    written = [*(word for path in files for word in ("--config", str(path))), *flags]
    given: dict[str, Any] = {}
    server: dict[str, Any] = {}
    environment: dict[str, str] = {}
    for path in files:
        own = read_config_file(path)
        # A later file changes single lines of these, as the learner reads them.
        server |= _server_section(own.pop("server", None))
        environment |= own.pop("env", {})
        for name, value in own.items():
            if flag := _flag_of_server(name, value):
                key, _, text = flag.removeprefix("--").partition(" ")
                raise InvalidRequest(
                    f"--config {path}: {name} belongs to the server: write `{key}: {text or 'true'}` below `server:`"
                )
        given |= own
    for name, value in _values(flags).items():
        if flag := _flag_of_server(name, value):
            raise InvalidRequest(f"--{name} belongs to the server: give --server-flags {shlex.quote(flag)}")
        given[name] = None if is_none(value) else value
    if given.get("rollout_url"):
        raise InvalidRequest("rollout_url: `learner up` starts the server itself; for one elsewhere, `learner train`")
    training.check(written)  # which knows other tools' names of what would be missing below
    if not given.get("model_name_or_path"):
        raise InvalidRequest("give --model_name_or_path: the base model of both, in the recipe or as a flag")
    output_dir = Path(given.get("output_dir") or Path("runs") / (files[-1].stem if files else "run"))
    check_writable(output_dir, "output_dir", directory=True)
    check_unused(output_dir)
    return Recipe(options, given, server, written, output_dir, environment)


def _flag_of_server(name: str, value: Any) -> str | None:
    """Return the server's flag, with its value, that an option stands for where the learner has none of that name."""
    return None if name in training.options() or name in ADDRESS else server_flag(name, value)


def _server_section(section: Any) -> dict[str, Any]:
    """Return the server's flags in a file by name, with underscores; raises `invalid_request` for anything else."""
    if section is not None and not isinstance(section, dict):
        raise InvalidRequest("server: write one `flag: value` of rollout-server a line below it")
    values = section or {}
    if numbers := [name for name in values if not isinstance(name, str)]:
        raise InvalidRequest(f"server: {numbers[0]} is no flag: write one `flag: value` of rollout-server a line")
    names = [name.lstrip("-").replace("-", "_") for name in values]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidRequest(f"server: {twice[0]} is there twice, with dashes and with underscores: leave one out")
    return dict(zip(names, values.values(), strict=True))


def _values(flags: Sequence[str]) -> dict[str, str]:
    """Return flags by name, with underscores; a flag without a value has an empty one."""
    values: dict[str, str] = {}
    for word, following in zip_longest(flags, flags[1:], fillvalue="--"):
        if word.startswith("--"):
            name, tie, value = word[2:].partition("=")
            values[name.replace("-", "_")] = value if tie else "" if following.startswith("--") else following
    return values


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the server's flags that follow from the learner's options."""
    common: dict[str, Any] = {"max_lora_rank": served_rank(adapter_rank(given))}
    if given.get("dtype"):
        common["dtype"] = dtype_name(str(given["dtype"]))
    if given.get("model_revision"):
        common["revision"] = given["model_revision"]
    return common | {name: True for name in ("trust_remote_code", "deterministic", "share_gpu") if is_true(given, name)}


def _slots(given: Mapping[str, Any]) -> int:
    """Return the adapter slots that the learner will ask for, at most; 0 where it asks for none, or cannot be told."""
    if given.get("in_flight") not in (None, "drain"):
        return 0

    def count(name: str, default: int) -> int:
        value = given.get(name)
        return default if value is None else int(value)

    try:
        accumulated = count("gradient_accumulation_steps", 1)
        batch = count("generation_batch_size", 0) // count(
            "per_device_train_batch_size", 8
        )  # of one rank: more have less
        return slots_needed(
            count("max_staleness", 0),
            steps_per_generation=count("steps_per_generation", batch or accumulated),
            num_iterations=count("num_iterations", 1),
            gradient_accumulation_steps=accumulated,
        )
    except (ValueError, TypeError, ZeroDivisionError):  # the learner says what is wrong with it
        return 0


def _encoders(model: str, revision: Any) -> list[str]:
    """Return which parts a model has beside its language model; none where its configuration cannot be read."""
    try:
        return encoders(_configuration(model, revision))
    except Exception as error:  # of the network, of any kind
        logger.debug("the model's configuration cannot be read: %s", error)
        return []


def _configuration(model: str, revision: Any) -> dict[str, Any]:
    """Return config.json of a model: from its directory, the hub's cache, or the hub, which is asked once."""
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    here = Path(model).expanduser()
    found = here / "config.json" if here.is_dir() else try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(found, str | Path):
        return dict(json.loads(Path(found).read_text()))
    url = hf_hub_url(model, "config.json", revision=revision)
    answer = get_session().get(url, headers=build_hf_headers(), timeout=_HUB_S, follow_redirects=True)
    return dict(answer.raise_for_status().json())


def _task(given: Mapping[str, Any]) -> Task:
    """Load the task as `learner train` does, but for its rewards: nothing is scored here."""
    from learner.tasks import load_task

    options = {"seed": 42, **{name: getattr(LearnerConfig, name) for name in _TASK_OPTIONS}}
    options |= {name: value for name, value in given.items() if value is not None}
    return load_task(
        str(given["task"]),
        task_args=json_object(options["task_args"], "task_args"),
        eval_size=None if options["eval_size"] is None else int(options["eval_size"]),
        train_size=int(options["train_size"]) if options["train_size"] else None,
        seed=int(options["seed"]),
        prompt_column=str(options["prompt_column"]),
        eval_dataset=options["eval_dataset"],
        default_reward=lambda completions, **_: [0.0] * len(completions),
    )


def adapter_rank(given: Mapping[str, Any]) -> int:
    """Return the highest rank of the adapter that options of the learner make or start with.

    Raises:
        InvalidRequest: it cannot be told, or no server can serve it.
    """
    try:
        if adapter := given.get("init_adapter"):
            own = json.loads((Path(adapter) / "adapter_config.json").read_text())
        else:
            kwargs = given.get("lora_kwargs") or {}
            own = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
            own = {"r": given.get("lora_r", 16), **own}
        rank = max([int(own["r"]), *map(int, (own.get("rank_pattern") or {}).values())])
        served_rank(rank)
        return rank
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InvalidRequest(
            f"the adapter's rank (lora_r, lora_kwargs, init_adapter) cannot be told: {error}"
        ) from error


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Return options as command-line flags of vLLM's parser."""
    flags: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags
