"""What `learner up` shows: lines of its own, and those of its processes."""

from __future__ import annotations

import contextlib
from pathlib import Path


class Output:
    """Output of one process: all of it in a log, and on the terminal behind the process's name."""

    def __init__(self, name: str, log: Path) -> None:
        self.name, self._file, self.last = name, log.open("a", errors="replace"), ""

    def __call__(self, line: str) -> None:
        """Take a line. A full disk or a closed terminal stops neither process."""
        if line.strip():
            if not line.startswith("INFO:"):  # uvicorn says last that it has shut down, and before that somebody why
                self.last = line
            with contextlib.suppress(OSError, ValueError):
                print(f"{self.name:<7} | {line}", flush=True)
        with contextlib.suppress(OSError, ValueError):
            self._file.write(line + "\n")
            self._file.flush()


def say(text: str) -> None:
    """Print a line of this command's own."""
    with contextlib.suppress(OSError):
        print(f"{'up':<7} | {text}", flush=True)
