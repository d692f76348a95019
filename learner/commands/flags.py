"""Flags of the commands that parse without TRL."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def either_spelling(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Return `add_argument` that also accepts a flag with underscores, as `learner train` does."""

    def add(flag: str, **kwargs: Any) -> None:
        name = flag.removeprefix("--")
        spellings = {flag: None, "--" + name.replace("-", "_"): None} if name != flag else [flag]
        parser.add_argument(*spellings, **kwargs)

    return add
