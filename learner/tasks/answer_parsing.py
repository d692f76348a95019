"""Finding the answer in a completion."""

from __future__ import annotations

import re
from collections.abc import Callable

from learner.tasks.base import TaskError

# Commas count as thousands separators only. A minus sign belongs to the number unless it follows a digit or a closing
# bracket, where it is a subtraction.
_NUMBER = re.compile(r"(?:(?<![\d.)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_number(text: str) -> str | None:
    """The last number in the text, without thousands separators: "so 3 + 4 = 7." gives "7"."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].replace(",", "") if numbers else None


def tagged(text: str) -> str | None:
    """What the last <answer>...</answer> holds."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def whole(text: str) -> str | None:
    """All of the text, without white space around it."""
    return text.strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"last_number": last_number, "tag": tagged, "whole": whole}


def extractor(name: str) -> Callable[[str], str | None]:
    """The extractor of that name.

    Raises:
        TaskError: if there is none.
    """
    if name not in EXTRACTORS:
        raise TaskError(f"answer {name!r} is not one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]
