"""One training at a time in an output_dir: two would write over each other's history, checkpoints and lease."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from learner.utils.wording import option
from shared.errors import InvalidRequest

TRAINING_LOCK, UP_LOCK = "training.lock", "up.lock"
_POLL_S = 0.2


class OutputLock:
    """A lock on a file of output_dir, until it is closed or this process ends, however it ends.

    A record lock (`lockf`): children do not inherit it. That of `flock` is held on by reward workers, which are forked
    and may live on for a while after a learner that was killed. Within one process it excludes nothing.

    Raises:
        InvalidRequest: another process holds it.
    """

    def __init__(self, output_dir: str | Path, name: str = TRAINING_LOCK) -> None:
        path, self._file = Path(output_dir) / name, -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)
        except OSError as error:
            if self._file >= 0 and error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(self._file, 20, 0).decode(errors="replace")
                self.close()
                raise InvalidRequest(
                    f"another training writes to {output_dir} just now (process {holder or 'unknown'}): stop it or "
                    f"wait for its end, or give another {option('output_dir')}"
                ) from error
            # Else the file system has no locks, or no room: what must be written there says so.

    def close(self) -> None:
        """Release it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def check_unused(output_dir: str | Path) -> None:
    """Raise `invalid_request` if another process trains in output_dir just now. This process must not."""
    if (Path(output_dir) / TRAINING_LOCK).is_file():
        OutputLock(output_dir).close()


def wait_unused(output_dir: str | Path, patience_s: float) -> bool:
    """Return whether no other process trains in output_dir, once that is so or after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            check_unused(output_dir)
            return True
        except InvalidRequest:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_POLL_S)
