"""Extraction of the answer from a completion."""

from __future__ import annotations

import re
from collections.abc import Callable

# Commas count as thousands separators only. A minus sign belongs to the number unless it follows a digit or a closing
# bracket, where it is a subtraction. A point begins a number unless it follows a letter, a digit or another point.
_NUMBER = re.compile(r"(?:(?<![\d.)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.)\]])\.\d+)")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_number(text: str) -> str | None:
    """Return the last number in the text, without thousands separators: "7" for "so 3 + 4 = 7.", "0.5" for ".5"."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return re.sub(r"^(-?)\.", r"\g<1>0.", numbers[-1].replace(",", "")) if numbers else None


def tagged(text: str) -> str | None:
    """Return the content of the last <answer>...</answer>."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def whole(text: str) -> str | None:
    """Return the text without surrounding white space."""
    return text.strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"last_number": last_number, "tag": tagged, "whole": whole}
