"""Flags of the commands that parse without TRL."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def either_spelling(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Return an `add_argument` for flags with dashes that also accepts underscores, as `learner train` does."""

    def add(flag: str, **kwargs: Any) -> None:
        if not flag.startswith("--"):
            parser.add_argument(flag, **kwargs)
            return
        spellings = dict.fromkeys([flag, "--" + flag.removeprefix("--").replace("-", "_")])
        parser.add_argument(*spellings, **kwargs)

    return add
