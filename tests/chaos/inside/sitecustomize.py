"""Errors that only a process itself can make, at a signal. Python runs this where $PYTHONPATH has this folder.

SIGUSR2 asks for memory that is not there, SIGUSR1 for an assertion that fails: on the GPU if the process uses one,
which then refuses everything that comes later. The main thread raises what follows, wherever it is. vLLM's engine and
worker get this from the server that starts them.
"""

from __future__ import annotations

import signal

_MORE_THAN_ANY_MACHINE = 2**50


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_initialized() else "cpu"


def _allocate(*_: object) -> None:
    import torch

    torch.empty(_MORE_THAN_ANY_MACHINE, dtype=torch.uint8, device=_device())


def _fail(*_: object) -> None:
    import torch

    torch._assert_async(torch.zeros((), device=_device()))


signal.signal(signal.SIGUSR2, _allocate)
signal.signal(signal.SIGUSR1, _fail)
