"""Child processes that end with the block that started them, also on signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType


class Stopped(BaseException):
    """A signal to stop arrived. Not an Exception, so that no handler of failures catches it."""


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """Raise `Stopped`, as the handler of a signal."""
    raise Stopped(signal.Signals(number).name)


@contextlib.contextmanager
def each_signal(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals with `handler` during the block; only on the main thread, since others cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` at the first SIGINT, SIGTERM or SIGHUP; ignore later ones while children are being ended."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    with each_signal(stop, *numbers):
        yield


def module_command(module: str) -> list[str]:
    """Return the command that runs one of our modules, also where the working directory has folders of its name."""
    return [sys.executable, "-P", "-m", module]


def module_environment() -> dict[str, str]:
    """Return the environment in which `module_command` runs the code of this process, installed or not."""
    folder = Path(__file__).parents[2]
    if folder.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


class ProcessGroup:
    """A command in a session of its own: Ctrl-C in the terminal reaches only its parent, which ends the group.

    Args:
        cores: CPUs it may run on; by default those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path | None = None,
        *,
        cores: Collection[int] | None = None,
    ) -> None:
        # Blocked until the child is known: a signal in between would orphan it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

        def begin() -> None:
            if cores is not None:
                os.sched_setaffinity(0, cores)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

        try:
            with log.open("wb") if log else contextlib.nullcontext() as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    env={**os.environ, **env},
                    start_new_session=True,
                    preexec_fn=begin,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def end(self, patience_s: float = 15.0) -> int:
        """Send SIGTERM, and SIGKILL to the rest of the group after `patience_s` seconds. Return the exit code."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience_s)
            deadline = time.monotonic() + 5.0
            while time.monotonic() < deadline:  # children usually end by themselves
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
