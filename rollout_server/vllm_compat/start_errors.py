"""The reason for which vLLM has not started, told by its processes to the server.

vLLM only says "see root cause above": in the log of an engine or worker process, some hundred lines up. Each of these
processes imports our worker extension before it loads the model, and calls `report_errors` then: what it logs with an
exception (vLLM 0.26 to 0.33: "EngineCore failed to start.", "WorkerProc failed to start.") also goes into a file, whose
first line is the root cause.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.messages import one_line

_VARIABLE = "LOCKSTEP_START_ERRORS"


class _Reporter(logging.Handler):
    """Appends exceptions to a file, for as long as its folder exists: until the engine has started."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        error = getattr(error, "cause", None) or error  # what a worker on a Ray cluster has raised, without Ray's words
        if error is not None:
            with contextlib.suppress(OSError), self._path.open("a") as file:
                file.write(f"{type(error).__name__}: {one_line(error)}\n")


def report_errors() -> None:
    """Report what vLLM logs in this process, which the server has started."""
    if path := os.environ.get(_VARIABLE):
        logging.getLogger("vllm").addHandler(_Reporter(Path(path)))


@contextlib.contextmanager
def reported_errors() -> Iterator[Callable[[], str | None]]:
    """Let processes that are started in the block report; yield what returns the first report, if there is one."""
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        path = Path(folder, "errors")
        os.environ[_VARIABLE] = str(path)
        try:
            yield lambda: path.read_text(errors="replace").partition("\n")[0] if path.is_file() else None
        finally:
            del os.environ[_VARIABLE]
