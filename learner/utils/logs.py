"""Print the log of a training: one line per message, above the progress bar."""

from __future__ import annotations

import logging
from typing import TextIO

from tqdm import tqdm


class _AboveProgressBar(logging.Handler):
    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self._stream)


def show_messages(*, is_main: bool, stream: TextIO | None = None) -> None:
    """Print messages of the `lockstep` loggers on the main rank, and errors on others.

    A program that has set up logging keeps its own handlers. The messages go to `stream`, by default to stdout.
    """
    logger = logging.getLogger("lockstep")
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    if not logger.hasHandlers():
        logger.addHandler(_AboveProgressBar(stream))
