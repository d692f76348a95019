"""Print the log of a training: one line per message, above the progress bar."""

from __future__ import annotations

import logging

from tqdm import tqdm


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def show_messages(*, is_main: bool) -> None:
    """Print messages of the `lockstep` loggers on the main rank, and errors on others.

    A program that has set up logging keeps its own handlers.
    """
    logger = logging.getLogger("lockstep")
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    if not logger.hasHandlers():
        logger.addHandler(_AboveProgressBar())
