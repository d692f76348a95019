"""Which arguments a function of the user's looks at: what it would ignore is refused, not dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from learner.tasks.base import TaskError


def reads(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function sees a keyword argument: it names it, or takes all others under a name without `_`.

    A callable without a signature counts as one that sees everything.

    Example:
        >>> reads(lambda **_: 1, "seed"), reads(lambda **options: dict(**options), "seed")
        (False, True)
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # of C
        return True
    return any(
        not each.name.startswith("_")
        if each.kind is each.VAR_KEYWORD
        else each.name == name and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        for each in parameters
    )


def check_task_args(task_args: Mapping[str, Any], *known: str) -> None:
    """Raise `TaskError` for an argument that is not among those a task knows."""
    if unknown := sorted(task_args.keys() - set(known)):
        raise TaskError(f"there is no task argument {', '.join(unknown)}; only {', '.join(known)}")
