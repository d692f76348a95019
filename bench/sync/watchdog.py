"""An end to rows that hang: a collective operation without a deadline must not take the other rows with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bench.common.servers import Server

#: For the learner's side to notice that its server is gone.
NOTICE_S = 30.0


class Watchdog:
    """Ends the server of a row after `limit_s`; where that frees nobody, writes the row down and gives up."""

    def __init__(self, limit_s: float, give_up: Callable[[], Any], notice_s: float = NOTICE_S) -> None:
        self.limit_s, self.give_up, self.notice_s = limit_s, give_up, notice_s

    @contextlib.contextmanager
    def over(self, server: Server, record: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """Watch over one row."""
        done = threading.Event()

        def watch() -> None:
            if done.wait(self.limit_s):
                return
            server.end()
            if not done.wait(self.notice_s):
                record({"ok": False, "error": f"nothing moved for {self.limit_s:.0f} s; the measurement ended here"})
                self.give_up()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
