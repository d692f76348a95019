"""Say what is being waited for, for how long, and what comes then: one way for all waits."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

#: Seconds after which a wait is mentioned; later ones come at the last interval.
MENTIONS_S = (5.0, 15.0, 30.0, 60.0)
#: For what takes a while as a matter of course.
LATER_S = (60.0,)

logger = logging.getLogger("lockstep.waits")


@contextlib.contextmanager
def waiting(
    what: str,
    *,
    limit_s: float | None = None,
    then: str = "",
    detail: Callable[[], str] = lambda: "",
    mentions_s: tuple[float, ...] | None = None,
) -> Iterator[None]:
    """Log now and then that the block waits for `what`; one that is over soon is not mentioned.

    Args:
        limit_s: when the block gives up.
        then: what happens then.
        detail: called for each mention, on a thread of its own: how it stands.
        mentions_s: after how many seconds; by default MENTIONS_S.
    """
    times, ended, started = mentions_s or MENTIONS_S, threading.Event(), time.monotonic()
    said = threading.Event()
    # Held while a mention is logged, so that none follows the end of the block.
    saying = threading.Lock()

    def mention() -> None:
        for due in itertools.chain(times, itertools.count(2 * times[-1], times[-1])):
            if ended.wait(max(started + due - time.monotonic(), 0.0)):
                return
            limit = "" if limit_s is None else f" of at most {limit_s:.0f} s" + (f", then {then}" if then else "")
            how = f" ({shown})" if (shown := detail()) else ""
            with saying:
                if ended.is_set():
                    return
                said.set()
                logger.info("waiting for %s%s: %.0f s%s", what, how, time.monotonic() - started, limit)

    threading.Thread(target=mention, name="lockstep-wait", daemon=True).start()
    try:
        yield
    finally:
        with saying:
            ended.set()
    if said.is_set():
        logger.info("waited %.0f s for %s", time.monotonic() - started, what)
