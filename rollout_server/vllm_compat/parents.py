"""Processes of an engine over several hosts that end with the one that started them, whatever has ended that one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time


def end_with_parent(after: float = 0.0) -> None:
    """End this process `after` seconds after the one that started it through `multiprocessing`, if it is one of those.

    vLLM's own watch begins when a worker has loaded the model; until then it may wait for other hosts for minutes.
    """
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent, after), name="lockstep-parent", daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess, after: float) -> None:
    parent.join()
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)
