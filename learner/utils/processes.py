"""Child processes that never outlive their parent's interest in them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived. Not an Exception: nothing on the way up may take it for a failure of its own."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped`, once; while children are being ended further ones are ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProcessGroup:
    """A command in a session of its own: a Ctrl-C in the terminal reaches its parent only, which then ends it whole.

    Args:
        cores: those it may run on; None: all that this process may.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path | None = None,
        *,
        cores: Collection[int] | None = None,
    ) -> None:
        # Blocked while the child is being made: a signal in between would leave a child that nobody knows.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

        def begin() -> None:
            if cores is not None:
                os.sched_setaffinity(0, cores)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

        try:
            with contextlib.ExitStack() as stack:
                output = stack.enter_context(log.open("wb")) if log else None
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
        """SIGTERM, and after `patience_s` seconds SIGKILL for whatever is left of the group. Answers its exit code."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience_s)
            deadline = time.monotonic() + 5.0
            while time.monotonic() < deadline:  # its children follow by themselves, mostly
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
