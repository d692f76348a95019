"""Import of the user's code by path: `my_module:reward`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.tasks.base import RewardFunc, TaskError


def import_object(path: str) -> Any:
    """Return the object at `module:attribute`. Modules in the current directory are found too.

    Raises `TaskError` if the path is malformed, there is no such module or attribute, or the module raises: that error
    is the cause, and named in the message.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise TaskError(f"{path!r} is not an import path; write it as module:function")
    if module_name.endswith(".py") or os.sep in module_name:
        file = Path(module_name.removesuffix(".py"))
        module = file.name if file.is_absolute() else ".".join(file.parts)
        raise TaskError(
            f"{path!r} names a file: write {module}:{attribute}, a module of the current directory or of $PYTHONPATH"
        )
    _current_directory_is_importable()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            where = f"in {os.getcwd()} or installed{_hidden(module_name)}"
            raise TaskError(f"no module {error.name!r} for {path!r} {where}") from error
        raise TaskError(f"importing {module_name!r} failed: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise TaskError(f"importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            there = f"it has {', '.join(public) or 'no callables'}{_hidden(module_name)}"
            raise TaskError(f"{path!r}: no {name!r} in {module_name}; {there}")
        found = getattr(found, name)
    return found


def is_importable(module_name: str) -> bool:
    """Return whether there is such a module, without importing it; its parents are imported."""
    if not all(part.isidentifier() for part in module_name.split(".")):
        return False
    _current_directory_is_importable()
    try:
        return importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):
        return False


def load_rewards(
    specs: Sequence[str] | None, weights: Sequence[float] | None, own: RewardFunc | None = None
) -> tuple[list[RewardFunc], list[float] | None]:
    """Return reward functions and their weights. `own` is the task's own score: the default, and `score` in `specs`.

    Raises `TaskError` if there is no reward, one is not callable, two have one name, or the weights do not match.
    """
    if not specs:
        if own is None:
            raise TaskError("a dataset needs a reward: give --reward_funcs module:function (one or several)")
        specs = ["score"]
    functions: list[RewardFunc] = []
    for spec in specs:
        if spec == "score" and own is None:
            raise TaskError("'score' stands for a task's own score, and a dataset has none; write module:function")
        function = own if spec == "score" else import_object(spec)
        if not callable(function):
            raise TaskError(f"reward {spec!r} is not a function, but a {type(function).__name__}")
        functions.append(function)
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(f"two rewards are called {', '.join(twice)}: rewards are logged by name, so rename one")
    if weights is not None and len(weights) != len(functions):
        raise TaskError(f"{len(weights)} reward weights for {len(functions)} rewards ({', '.join(names)})")
    if weights is not None and not all(map(math.isfinite, weights)):
        raise TaskError(f"reward weights {', '.join(map(str, weights))}: each must be a finite number")
    return functions, None if weights is None else [float(w) for w in weights]


def _current_directory_is_importable() -> None:
    # A console script has its own directory on the path, not the current one. It comes last: reward workers look for
    # our own packages on this path too, and folders of the user's may have their names.
    if "" not in sys.path and os.getcwd() not in sys.path:
        ours = str(Path(__file__).parents[2])
        sys.path += [os.getcwd()] if ours in sys.path else [ours, os.getcwd()]
    importlib.invalidate_caches()


def _hidden(module_name: str) -> str:
    """Return what to say where the user's module has the name of an installed one, which is found first."""
    top = module_name.partition(".")[0]
    found = importlib.util.find_spec(top)
    origin = Path((found and found.origin) or "")
    if not origin.is_absolute() or origin.is_relative_to(os.getcwd()):
        return ""
    own = [path for path in (Path(top).absolute(), Path(f"{top}.py").absolute()) if path.exists()]
    return f"; {own[0]} is hidden by {origin}: rename it" if own else ""
