"""Show the log of a training: one line a message, above the progress bar."""

from __future__ import annotations

import logging

from tqdm import tqdm

LOGGER = logging.getLogger("lockstep")


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def show_messages(*, is_main: bool) -> None:
    """Print what `lockstep` loggers say, on the main rank; others print errors only.

    A program that has set up logging keeps its own handlers.
    """
    LOGGER.setLevel(logging.INFO if is_main else logging.ERROR)
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(_AboveProgressBar())
