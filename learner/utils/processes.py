"""Child processes that end with the block that started them, also on signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds after which a signal comes again whose exception was dropped: what dropped it is over then.
_AGAIN_S = 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Stopped(BaseException):
    """A signal to stop arrived. Not an Exception, so that no handler of failures catches it.

    Attributes:
        dropped: Python has let nobody see it.
    """

    dropped = False


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """Raise `Stopped`, as the handler of a signal."""
    raise Stopped(signal.Signals(number).name)


@contextlib.contextmanager
def each_signal(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals with `handler` during the block; only on the main thread, since others cannot.

    One that comes where Python drops exceptions, as in callbacks of weak references, comes again: no `Stopped` is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    report = sys.unraisablehook

    def come_again(unraisable: Any) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            report(unraisable)
            return
        stopped.dropped = True
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.Signals[str(stopped)])).start()

    previous = {number: signal.signal(number, handler) for number in numbers}
    sys.unraisablehook = come_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Raise `Stopped` at the first SIGINT, SIGTERM or SIGHUP, and only there: children are being ended then.

    Yields the event that later signals set, which may come at any moment of that: see `ProcessGroup`.
    """
    stopped: Stopped | None = None
    hurry = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped and not stopped.dropped:
            hurry.set()
            return
        stopped = Stopped(signal.Signals(number).name)
        raise stopped

    # One that is ignored stays so: nohup's SIGHUP.
    with each_signal(stop, *(number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)):
        yield hurry


def allow_descriptors(wanted: int = 2**16) -> None:
    """Raise this process's soft limit on descriptors to `wanted`, or as far as it may: usual are 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def module_command(module: str) -> list[str]:
    """Return the command that runs one of our modules, also where the working directory has folders of its name."""
    return [sys.executable, "-P", "-m", module]


def module_environment() -> dict[str, str]:
    """Return the environment in which `module_command` runs the code of this process, installed or not."""
    folder = Path(__file__).parents[2]
    if folder.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def ending(status: int) -> str:
    """Return how a process has ended, in words."""
    if status == -signal.SIGKILL:
        return "SIGKILL (which the system sends when memory runs out: see dmesg)"
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


class ProcessGroup:
    """A command in a session of its own: Ctrl-C in the terminal reaches only its parent, which ends the group.

    Args:
        log: a file for its output; or a function, which gets each line on a thread (the command then gets SIGTERM if
            this process is killed). By default its output is that of this process.
        cores: CPUs it may run on; by default those of this process.
        patience_s: seconds that the command gets to end by itself when the block ends.
        hurry: once it is set the command gets no more time to end by itself.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path | Callable[[str], None] | None = None,
        *,
        cores: Collection[int] | None = None,
        patience_s: float = 15.0,
        hurry: threading.Event | None = None,
    ) -> None:
        self.patience_s, self._hurry = patience_s, hurry or threading.Event()
        # Blocked until the child is known: a signal in between would orphan it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set(_SIGNALS))
        read_lines = None if log is None or isinstance(log, Path) else log

        def begin() -> None:
            if cores is not None:
                os.sched_setaffinity(0, cores)
            if read_lines and _LIBC:  # nobody would read its output any more
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

        try:
            with log.open("wb") if isinstance(log, Path) else contextlib.nullcontext() as file:
                output = subprocess.PIPE if read_lines else file
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    env={**os.environ, **env},
                    start_new_session=True,
                    preexec_fn=begin,
                    text=True,
                    errors="replace",
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._reader = threading.Thread(target=self._read, args=(read_lines,), daemon=True) if read_lines else None
        if self._reader:
            self._reader.start()

    def _read(self, take: Callable[[str], None]) -> None:
        assert self.process.stdout
        for line in self.process.stdout:  # a carriage return ends a line, too
            take(line.rstrip())

    def end(self) -> int:
        """Send SIGTERM, and SIGKILL to the rest of the group after `patience_s` seconds, or at once if there is a hurry
        or a signal stops this process meanwhile. Return the exit code."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                self._wait(lambda: self.process.poll() is not None, self.patience_s)
            if self.process.poll() is not None:
                self._wait(self._is_gone, 5.0)  # children usually end by themselves
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self._reader:
                self._reader.join(5.0)  # of what it has said last
        return self.process.returncode

    def _wait(self, ended: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (ended() or self._hurry.is_set()) and time.monotonic() < deadline:
            time.sleep(0.05)  # waiting on the event holds a lock that its setting, by the handler, needs

    def _is_gone(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
