"""Log of a run's servers as JSON lines: tokens per second, and when each came and went."""

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
    """Appends `{"time", "server", "event"}` and `{"time", "server", "tokens"}`; times are Unix seconds.

    Tokens are counted when their group arrives, and written with the first tokens of a later second.
    """

    def __init__(self, path: Path, pool: ServerPool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a")
        self._lock = threading.Lock()
        self._second, self._tokens = 0, Counter[str]()
        for replica in pool.up():
            self.event(replica, "serves")
        pool.on_change, pool.on_tokens = self.event, self.tokens

    def event(self, replica: Replica, text: str) -> None:
        """Log that a server came, went, or was refused."""
        self._write([{"time": round(time.time(), 3), "server": replica.url, "event": text}])

    def tokens(self, replica: Replica, count: int) -> None:
        """Count tokens of completions that a server has sent."""
        second = int(time.time())
        with self._lock:
            if second != self._second:
                self.flush()
                self._second = second
            self._tokens[replica.url] += count

    def flush(self) -> None:
        """Write the tokens that were counted and not yet written."""
        self._write([{"time": self._second, "server": s, "tokens": count} for s, count in sorted(self._tokens.items())])
        self._tokens.clear()

    def _write(self, lines: list[dict[str, object]]) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end a training that writes no checkpoint just now
            self._stream.write("".join(json.dumps(line) + "\n" for line in lines))
            self._stream.flush()
