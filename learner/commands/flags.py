"""Flags of the commands that need no torch, and so no TrlParser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def either_spelling(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """`add_argument` for flags with dashes, and with underscores as in `learner train`."""

    def add(flag: str, **kwargs: Any) -> None:
        if not flag.startswith("--"):
            parser.add_argument(flag, **kwargs)
            return
        spellings = dict.fromkeys([flag, "--" + flag.removeprefix("--").replace("-", "_")])
        parser.add_argument(*spellings, **kwargs)

    return add
