"""Runs the program of one episode, and ends it when the learner is gone: `python supervisor.py PARENT FOLDER COMMAND`.

A process of its own, since only a parent that lives on can end what a killed learner leaves behind. It is given what
the program has started and left, in whichever group or session. Between it and the learner, or an actor of Ray's,
there is one more, the leader of the program's process group: Ray kills the children of an actor that it ends, and would
kill the supervisor. Only the standard library is imported, so that both start at once, in the environment that the
program is to see.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

#: How long a program may take to end by itself.
_GRACE_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class _Stopped(BaseException):
    """SIGTERM: from the learner, or from the kernel because the leader, and the learner, have ended."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def main(parent: str, folder: str, command: str) -> int:
    """Return the exit code of the shell that runs `command`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is a supervisor that takes it
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has ended before
        shutil.rmtree(folder, ignore_errors=True)
        return 1
    leader = os.getpid()
    if supervisor := os.fork():
        return _as_a_shell(os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1]))
    return _supervise(leader, folder, command, prctl)


def _supervise(leader: int, folder: str, command: str, prctl: Callable[[int, int], int]) -> int:
    program = None
    try:
        signal.signal(signal.SIGTERM, _stop)
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if os.getppid() != leader:
            raise _Stopped
        program = subprocess.Popen(["/bin/sh", "-c", command])
        code = program.wait()
        _end_children()
        return _as_a_shell(code)
    except _Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        if program:
            with suppress(subprocess.TimeoutExpired):
                program.wait(_GRACE_S)
        _end_children()
        if os.getppid() != leader:  # else the learner removes it
            shutil.rmtree(folder, ignore_errors=True)
        return 128 + signal.SIGTERM  # to the leader, which takes it, or has ended


def _as_a_shell(code: int) -> int:
    """Return the exit code by which a shell says that a process was ended by a signal; any other as it is."""
    return code if code >= 0 else 128 - code


def _end_children() -> None:
    """Kill all children, and theirs, which are then children of this process, until none is left."""
    while True:
        for pid in _children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            _, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
