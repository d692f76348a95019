"""Runs in a reward worker, a process that imports torch and TRL only if the user's reward functions do."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from learner.rewards.calls import RewardResult, call_reward
from shared.errors import LockstepError

#: The pool's number of a function -> the function, or the traceback if it cannot be loaded here.
_functions: dict[int, Callable[..., Any] | str] = {}


def prepare(parent: int, blobs: Mapping[int, bytes]) -> None:
    """Limit this process and load the functions, before any time limit begins to count.

    Args:
        parent: process id of the learner; this process dies with it, even when stuck.
        blobs: cloudpickled reward functions.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would not run while a function is stuck
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load(blobs)


def load(blobs: Mapping[int, bytes]) -> None:
    """Load the functions, before any time limit begins to count.

    Args:
        blobs: cloudpickled reward functions.
    """
    for index, blob in blobs.items():
        try:
            _functions[index] = cloudpickle.loads(blob)
        except Exception:
            _functions[index] = traceback.format_exc()


def load_error(index: int) -> str | None:
    """Return the traceback of loading a function; None if it was loaded."""
    function = _functions[index]
    return function if isinstance(function, str) else None


def score(index: int, name: str, payload: bytes) -> bytes:
    """Call a reward function as TRL does, but record what it logs; return a pickled `RewardResult`.

    Takes `RewardCall.payload`. Raises nothing, so that every error of the pool is about the process.
    """
    function, result = _functions[index], RewardResult()
    if isinstance(function, str):
        return cloudpickle.dumps(RewardResult(error=function.strip().splitlines()[-1], traceback=function))
    recorders = {
        "log_metric": lambda metric, value: result.metrics.append((metric, float(value))),
        "log_extra": lambda column, values: result.extras.append((column, list(values))),
    }
    try:
        result.rewards = call_reward(name, function, {**pickle.loads(payload), **recorders})  # noqa: S301 - the learner's
        return cloudpickle.dumps(result)
    except LockstepError as error:
        return cloudpickle.dumps(RewardResult(error=error.message, traceback=traceback.format_exc()))
    except BaseException as error:
        return cloudpickle.dumps(
            RewardResult(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        )
