"""What every server did in a run, as JSON lines: tokens by the second, and when it came and went."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from pathlib import Path

from learner.servers.pool import ServerPool
from learner.servers.replica import Replica


class EventLog:
    """Writes `{"time", "server", "event"}` and `{"time", "server", "tokens"}`; times are seconds since the epoch.

    Tokens count when their group has come, and are written when a later second's come.
    """

    def __init__(self, path: Path, pool: ServerPool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a")
        self._lock = threading.Lock()
        self._second, self._tokens = 0, Counter[str]()
        for replica in pool.up():
            self.event(replica, "serves")
        pool.on_change, pool.on_tokens = self.event, self.tokens

    def event(self, replica: Replica, what: str) -> None:
        """The server came, went, or was refused."""
        self._write([{"time": round(time.time(), 3), "server": replica.url, "event": what}])

    def tokens(self, replica: Replica, count: int) -> None:
        """So many tokens of completions have come from it."""
        second = int(time.time())
        with self._lock:
            past = self._second, self._tokens
            if second != self._second:
                self._second, self._tokens = second, Counter()
            self._tokens[replica.url] += count
        if past[0] != second:
            self._write([{"time": past[0], "server": url, "tokens": n} for url, n in sorted(past[1].items())])

    def close(self) -> None:
        """Write the last second."""
        self._write([{"time": self._second, "server": url, "tokens": n} for url, n in sorted(self._tokens.items())])
        self._tokens.clear()

    def _write(self, lines: list[dict[str, object]]) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end a training that writes no checkpoint just now
            self._stream.write("".join(json.dumps(line) + "\n" for line in lines))
            self._stream.flush()
