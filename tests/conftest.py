"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import signal

# Before torch is imported: as many workers as cores, each with a thread for every core, wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Take Ctrl-C also where the shell had it ignored, as it does for commands in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Until all modules of tests are imported, which takes a fifth longer with it.
gc.disable()


def pytest_collection_finish() -> None:
    """Take what the imports left behind out of every later collection: the end of each training asks for one."""
    gc.collect()
    gc.freeze()
    gc.enable()
