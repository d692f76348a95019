"""Runs inside a reward worker: a process that holds the user's reward functions, and neither torch nor TRL unless they
do. Imports nothing heavy, for that reason.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle

from learner.rewards.calls import RewardResult

_PR_SET_PDEATHSIG = 1


#: In the order in which the pool numbers them; the traceback in place of one that cannot be loaded here.
_functions: list[Callable[..., Any] | str] = []


def prepare(parent: int, blobs: Sequence[bytes]) -> None:
    """Make this process cheap, mortal, and ready: functions are loaded before any time limit begins to count.

    Args:
        parent: process id of the learner, with which this process dies however stuck it is.
        blobs: cloudpickled reward functions.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would not run while a function is stuck
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for blob in blobs:
        try:
            _functions.append(cloudpickle.loads(blob))
        except Exception:
            _functions.append(traceback.format_exc())


def load_error(index: int) -> str | None:
    """Why this function cannot be loaded in a worker; None if it can."""
    function = _functions[index]
    return function if isinstance(function, str) else None


def score(index: int, payload: bytes) -> bytes:
    """A pickled `RewardResult`. Nothing is raised, so that what the pool raises is about the process.

    Args:
        payload: cloudpickled keyword arguments.
    """
    function = _functions[index]
    try:
        answer = RewardResult(error=function) if isinstance(function, str) else call(function, pickle.loads(payload))  # noqa: S301 - the learner's own bytes
        return cloudpickle.dumps(answer)
    except Exception:
        return cloudpickle.dumps(RewardResult(error=traceback.format_exc()))


def call(function: Callable[..., Any], kwargs: dict[str, Any]) -> RewardResult:
    """Call a reward function as TRL does, with recorders for `log_metric` and `log_extra`. Raises nothing."""
    answer = RewardResult()

    def log_metric(name: str, value: float) -> None:
        answer.metrics.append((name, float(value)))

    def log_extra(column: str, values: list[Any]) -> None:
        answer.extras.append((column, list(values)))

    try:
        rewards = function(**kwargs, log_metric=log_metric, log_extra=log_extra)
        if inspect.iscoroutine(rewards):
            rewards = asyncio.run(rewards)
        answer.rewards = [None if reward is None else float(reward) for reward in rewards]
    except BaseException:  # sys.exit() in a reward function is no way to end a training
        answer.error = traceback.format_exc()
    return answer
