"""Rewards to name on the command line: `--reward_funcs learner.tasks.rewards:math_answer`."""

from __future__ import annotations

import logging
import re
import threading
from functools import cache
from typing import Any

from learner.tasks.base import REWARD_ARGUMENTS, TaskError
from learner.tasks.prompts import completion_text

_WORD = re.compile(r"[A-Za-z]{3,}")


def exact_match(
    prompts: list[Any], completions: list[Any], answer: list[Any] | None = None, **columns: Any
) -> list[float | None]:
    """Return 1 where the completion equals the column `answer`, ignoring surrounding white space; else 0.

    None (no reward) where the row has no answer.
    """
    if answer is None:
        raise TaskError(f"exact_match needs a column 'answer'; the dataset has {_names(columns)}")
    return [
        None if gold is None else float(completion_text(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def math_answer(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Return 1 where the completion's final answer equals the column `answer` (or `solution`) mathematically; else 0.

    Of GSM8K's answers the part after `####` is used. The final answer is a boxed one if there is any, else the last
    expression. None (no reward) where the column's answer cannot be parsed.

    Example:
        >>> math_answer([], ["so it is \\boxed{1/2}", "3"], answer=["0.5", "0.5"])
        [1.0, 0.0]
    """
    golds = answer if answer is not None else solution
    if golds is None:
        raise TaskError(f"math_answer needs a column 'answer' or 'solution'; the dataset has {_names(columns)}")
    return [_math_score(completion_text(c), str(gold)) for c, gold in zip(completions, golds, strict=True)]


def _math_score(text: str, gold: str) -> float | None:
    from math_verify import parse, verify

    # math_verify's time limits use SIGALRM, which only the main thread can receive.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    if limit is None:
        for part in ("parser", "grader"):
            logging.getLogger(f"math_verify.{part}").setLevel(logging.ERROR)
    expected = _parse_gold(gold.rpartition("####")[2].strip(), limit)
    if not expected:
        return None
    found = parse(text, parsing_timeout=limit)
    return float(bool(found) and verify(expected, found, timeout_seconds=limit))


@cache
def _parse_gold(gold: str, limit: int | None) -> list[Any]:
    from math_verify import parse

    found = parse(gold, parsing_timeout=limit)
    if not found and ("\\" in gold or not _WORD.search(gold)):  # as LaTeX, where words would be products of letters
        found = parse(f"${gold}$", parsing_timeout=limit)
    return list(found)


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(sorted(set(columns) - set(REWARD_ARGUMENTS))) or "no other columns"
