"""Options of `learner train`, from flags and YAML files: checked by name and value before anything is built of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import GRPOConfig, ModelConfig, TrlParser

from learner.commands.config_file import read_config_file
from learner.commands.flags import Parser, dtype_name, is_none, number, without_usage
from learner.config import LearnerConfig
from learner.foreign_options import unknown_option
from learner.trainer.checks import MAY_BE_INFINITE
from shared.errors import InvalidRequest
from shared.messages import one_line, unknown_flag

#: Least values of TRL's options; where they are not kept, an error far inside says something else, or nothing does.
_LEAST = {
    "lora_r": 1,
    "lora_alpha": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": 1,
    "steps_per_generation": 1,
    "num_generations": 2,
    "num_generations_eval": 1,
    "num_iterations": 1,
    "max_completion_length": 1,
    "save_total_limit": 1,
    "max_steps": -1,
    "lora_dropout": 0,
    "num_train_epochs": 0,
    "warmup_steps": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "temperature": 0,
    "beta": 0,
    "top_entropy_quantile": 0,
    "epsilon": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
}
_ABOVE = {"logging_steps": 0, "save_steps": 0, "eval_steps": 0}
_MOST = {"lora_dropout": 1, "top_p": 1, "top_entropy_quantile": 1, "seed": 2**32 - 1}
#: Values that TRL would look at in the first step only.
_CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
#: Our defaults, where TRL's cannot be meant: only adapters can be trained, and the server applies no dropout.
DEFAULTS = {"use_peft": True, "lora_dropout": 0.0}
_SCALES = {"true": "group", "false": "none"}  # as TRL takes them in Python


class OptionParser(TrlParser):
    """TRL's parser, with one line for every error, and YAML files whose values pass the same checks as flags."""

    def __init__(self) -> None:
        super().__init__((LearnerConfig, GRPOConfig, ModelConfig), prog="learner train", allow_abbrev=False)
        self.set_defaults(**DEFAULTS)
        hints: dict[str, Any] = {}
        for options in self.dataclass_types:
            hints |= get_type_hints(options)
        #: Option -> its flag, and the types it may have.
        self._options: dict[str, tuple[argparse.Action, set[Any]]] = {}
        #: Those that are text or a list, and fsdp, which is a text of several words.
        self._one_or_several: list[argparse.Action] = []
        for action in self._actions:
            if action.dest in hints and action.dest not in self._options:  # the second one is --no_OPTION
                kinds = _kinds(hints[action.dest])
                if action.dest == "num_generations":  # TRL's hint allows None, and TRL fails with it
                    kinds.discard(NoneType)
                self._options[action.dest] = action, kinds
                action.type = _type(action, kinds)
                action.choices = _CHOICES.get(action.dest, action.choices)
                if action.choices and NoneType in kinds:
                    action.choices = [*action.choices, None]
                if action.dest == "fsdp" or {str, list} <= kinds:
                    action.nargs = "*" if action.nargs == "?" else "+"
                    self._one_or_several.append(action)

    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(without_usage(message))

    def parse(self, argv: Sequence[str]) -> tuple[LearnerConfig, GRPOConfig, ModelConfig]:
        """Parse flags, and the files of `--config` before them.

        Raises:
            InvalidRequest: names the option.
        """
        files = Parser(prog=self.prog, add_help=False)
        files.add_argument("--config", action="append", default=[], metavar="FILE.yaml")
        known, flags = files.parse_known_args(argv)
        for path in known.config:
            self._read(path)
        values, unknown = self.parse_known_args(flags)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            if not flag.startswith("--"):
                raise InvalidRequest(unknown_flag([flag], ["--config"]))
            name, _, value = flag.removeprefix("--").partition("=")
            value = value or next(iter(unknown[unknown.index(flag) + 1 :]), "")
            raise InvalidRequest(unknown_option(name, value, self._options))
        for action in self._one_or_several:
            words = getattr(values, action.dest)
            if words is not self.get_default(action.dest):  # given as a flag
                setattr(values, action.dest, _one_or_several(action, words))
        try:
            config, args, model_args = (_made(options, vars(values)) for options in self.dataclass_types)
        except Exception as error:  # of TRL, transformers and accelerate, of any kind
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise InvalidRequest(kind + one_line(error)) from error
        return config, args, model_args

    def _read(self, path: str) -> None:
        """Make the options of a file the defaults."""
        options = read_config_file(path)
        options.pop("server", None)  # of the rollout server, for `learner up`
        environment = options.pop("env", {})
        for name, value in options.items():
            if name not in self._options:
                raise InvalidRequest(f"--config {path}: {unknown_option(name, value, self._options, flag=False)}")
            try:
                self.set_defaults(**{name: self._value(name, value)})
            except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
                raise InvalidRequest(f"--config {path}: {name}: {one_line(error)}") from error
        os.environ.update(environment)

    def _value(self, name: str, value: Any) -> Any:
        action, kinds = self._options[name]
        if value is None and NoneType not in kinds:
            raise ValueError("has no value; leave the line out for the default, or write null as text in quotes")
        if isinstance(value, list):
            if list not in kinds:
                raise ValueError("takes one value, not a list")
            return [_scalar(action, item) for item in value]
        if isinstance(value, dict) and dict not in kinds:
            raise ValueError("takes " + ("a list" if list in kinds else "one value") + ", not nested keys")
        if value is None or isinstance(value, dict):
            return value
        value = _scalar(action, value)
        return [value] if action.nargs == "+" and str not in kinds else value


def _made(options: type, values: dict[str, Any]) -> Any:
    return options(**{field.name: values[field.name] for field in dataclasses.fields(options) if field.init})


def _kinds(hint: Any) -> set[Any]:
    """Return the types of a field: {list, NoneType} of `list[str] | None`."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _type(action: argparse.Action, kinds: set[Any]) -> Any:
    """Return what turns text into a value of the option."""
    name = action.dest
    of_number = {action.type, *kinds} & {int, float}
    if of_number and str not in kinds:
        bounds = {"least": _LEAST.get(name), "most": _MOST.get(name), "above": _ABOVE.get(name)}
        given: dict[str, Any] = {bound: value for bound, value in bounds.items() if value is not None}
        kind = float if float in of_number else int
        parse = number(kind, **given, may_be_infinite=name in MAY_BE_INFINITE)
        return _or_none(parse) if NoneType in kinds and list not in kinds else parse
    if name == "scale_rewards":
        return lambda text: _SCALES.get(text.lower(), text)
    own: dict[str, Any] = {"dtype": dtype_name, "attn_implementation": _attention}
    made: Any = own.get(name, action.type)
    if dict in kinds and name not in LearnerConfig.__dataclass_fields__:  # which reads JSON itself
        made = partial(_dict_or_path, may_be_path=name in ("accelerator_config", "fsdp_config", "deepspeed"))
    # `none` may be a word of a list.
    return _or_none(made or str) if NoneType in kinds and list not in kinds else made


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Take `none` and `null` for None, as TRL does where a number may be None: so a flag undoes a line of a file."""
    return lambda text: None if is_none(text) else parse(text)


def _one_or_several(action: argparse.Action, words: list[Any]) -> Any:
    """Return the words of a flag as its option takes them: one as it is, several as a list, or as text."""
    if not words:
        return action.const
    return words[0] if len(words) == 1 else " ".join(words) if action.nargs == "*" else words


def _attention(text: str) -> str:
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if text not in known and "/" not in text:  # kernels of the hub have a slash
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return text


def _dict_or_path(text: str, *, may_be_path: bool) -> Any:
    if text == "" or (may_be_path and not text.startswith("{")):
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {type(value).__name__}")
    return value


def _scalar(action: argparse.Action, value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("each item of the list must be one value")
    made = action.type(value) if callable(action.type) else value
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return made
