"""Clean up after a block without hiding why it failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

logger = logging.getLogger("lockstep.utils")


@contextlib.contextmanager
def finally_do(action: Callable[[], object], what: str) -> Iterator[None]:
    """Call `action` at the end of the block; where the block has failed, an error of `action` is only logged.

    Args:
        what: names the action in the log.
    """
    try:
        yield
    except BaseException:
        try:
            action()
        except Exception as error:
            logger.warning("%s failed as well: %s", what, error)
        raise
    action()
