"""Parsers of the commands: a wrong flag is one line, and numbers must be numbers, within their range."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from shared.adapter_file import DTYPES
from shared.errors import InvalidRequest
from shared.messages import unknown_flag

#: As transformers' parser of options takes them.
_TRUE = ("true", "t", "yes", "y", "1", "")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_DTYPES |= {name: name for name in DTYPES}
_UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """`argparse` that raises `InvalidRequest` where it would print its usage and exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            message = unknown_flag(message.removeprefix(_UNKNOWN).split(), self._option_string_actions)
        raise InvalidRequest(without_usage(message))


def without_usage(message: str) -> str:
    """Return argparse's error with one spelling of the flag."""
    return re.sub(r"^argument (-\S+?)(/-\S+)?: ", r"\1: ", message)


def number(
    kind: type[int] | type[float] = float,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    may_be_infinite: bool = False,
) -> Callable[[str], float]:
    """Return a `type` of argparse for numbers from `least` to `most`, more than `above`; NaN is none."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        if math.isinf(value) and not may_be_infinite:
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if not (least <= value <= most and value > above):
            bounds = [f"at least {least:g}"] if least > -math.inf else []
            bounds += [f"more than {above:g}"] if above > -math.inf else []
            bounds += [f"at most {most:g}"] if most < math.inf else []
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {' and '.join(bounds)}")
        return value

    return parse


def is_true(given: Mapping[str, Any], name: str) -> bool:
    """Return whether an option, as it was written, switches something on; a flag without a value does.

    Example:
        assert is_true({"use_cpu": "yes"}, "use_cpu") and not is_true({}, "use_cpu")
    """
    return name in given and str(given[name]).lower() in _TRUE


def is_none(value: Any) -> bool:
    """Return whether an option, as it was written, has no value: `none` and `null` say so on a command line.

    Example:
        assert is_none("null") and not is_none("")
    """
    return value is None or str(value).lower() in ("none", "null")


def dtype_name(text: str) -> str:
    """Return the full name of a dtype (bfloat16 for bf16), as a `type` of argparse."""
    return _DTYPES.get(text.lower().removeprefix("torch."), text)


def either_spelling(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Return `add_argument` that also accepts a flag with underscores, as `learner train` does."""

    def add(flag: str, **kwargs: Any) -> None:
        name = flag.removeprefix("--")
        spellings = {flag: None, "--" + name.replace("-", "_"): None} if name != flag else [flag]
        parser.add_argument(*spellings, **kwargs)

    return add


def words(text: str) -> list[str]:
    """Split as a shell would, as a `type` of argparse."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of flags: {error}") from error


def tied(argv: Sequence[str], names: Sequence[str] = ("--server-flags", "--server_flags")) -> list[str]:
    """Tie the value of a flag in `names` to it, since argparse takes `--x` for a flag itself."""
    found: list[str] = []
    for word in argv:
        if found and found[-1] in names:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found
