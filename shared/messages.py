"""Wording of errors on a command line: one line each, and the nearest name for one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


def one_line(error: BaseException) -> str:
    """Return what `error` says, on one line; of pydantic's, the fields and their problems."""
    if isinstance(error, ValidationError):
        problems = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors(include_url=False)]
        text = "; ".join(f"{place}: {problem}" if place else problem for place, problem in problems)
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def unknown_flag(words: list[str], known: Iterable[str]) -> str:
    """Return what to say of `words` of a command line that no flag has taken."""
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        return stray_word(words[0], known)
    flag = flag.partition("=")[0]
    return f"there is no {flag}{did_you_mean(flag, known)}"


def stray_word(word: str, known: Iterable[str]) -> str:
    """Return what to say of a word of a command line that belongs to no flag; of a recipe's, how to give it."""
    is_recipe = word.endswith((".yaml", ".yml")) and "--config" in known
    return f"{word} belongs to no option: write --{'config' if is_recipe else 'NAME'} {word}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ": did you mean X?" for the name nearest to `name`, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {near[0]}?" if near else ""
