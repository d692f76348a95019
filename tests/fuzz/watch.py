"""What must hold while any request is handled: `/health` answers at once, and the server's memory stays bounded."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

#: Longest time in which `/health` has to answer, and largest growth of the server's memory by one request.
HEALTH_S, GROWTH_BYTES = 1.0, 2**30
_EVERY_S, _LOOK_FOR_PROCESSES_S = 0.05, 2.0
_GIVE_UP_S = 150.0
#: What the server held before a request is the least that it held in this time before it.
_BEFORE_S = 10.0
_PAGE = 4096


class Watch:
    """Asks for `/health` again and again, each time on a new connection, and adds up the memory of some processes.

    Args:
        processes: returns the ids of the server's processes.
        during: returns what the server is doing.
        fail: called with a message for everything that does not hold.
        health_s: longest time in which `/health` has to answer.

    Attributes:
        slowest_s, growth: worst so far: of `/health` in seconds, of the memory in bytes.
    """

    def __init__(
        self,
        url: str,
        processes: Callable[[], list[int]],
        during: Callable[[], str],
        fail: Callable[[str], None],
        health_s: float = HEALTH_S,
    ) -> None:
        self._health_s = health_s
        self.slowest_s, self.growth = 0.0, 0
        self._address = (urlsplit(url).hostname or "", urlsplit(url).port or 80)
        self._processes, self._during, self._fail = processes, during, fail
        self._pids, self._looked = list[int](), 0.0
        self._held = deque[tuple[float, str, int]]()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            self._look_at_memory()
            self._ask_for_health()
            self._look_at_memory()

    def _ask_for_health(self) -> None:
        asked, during = time.monotonic(), self._during()
        status = health(self._address, _GIVE_UP_S)
        seconds = time.monotonic() - asked
        self.slowest_s = max(self.slowest_s, seconds)
        if status != 200:
            self._fail(f"/health gives {status or 'no answer'} during {during}: {seconds:.1f} s")
        elif seconds > self._health_s:
            now = self._during()
            self._fail(
                f"/health is late during {during}: {seconds:.1f} s" + (f", until {now}" if now != during else "")
            )

    def _look_at_memory(self) -> None:
        now, during = time.monotonic(), self._during()
        if now - self._looked > _LOOK_FOR_PROCESSES_S:
            self._pids, self._looked = self._processes(), now
        held = sum(map(_resident, self._pids))
        while self._held and self._held[0][0] < now - _BEFORE_S and self._held[0][1] != during:
            self._held.popleft()
        growth = held - min((bytes_ for _, _, bytes_ in self._held), default=held)
        self._held.append((now, during, held))
        self.growth = max(self.growth, growth)
        if growth > GROWTH_BYTES:
            self._fail(f"memory grows during {during}: by {growth / 2**20:.0f} MiB")
            self._held.clear()


def health(address: tuple[str, int], timeout_s: float) -> int:
    """Return the status of `/health` on a new connection; 0 if there is none."""
    try:
        with socket.create_connection(address, timeout=timeout_s) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            return int(connection.recv(4096).split(b" ")[1])
    except (OSError, IndexError, ValueError):
        return 0


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
