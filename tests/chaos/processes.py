"""Supervised processes, which are restarted when they die, and their descendants."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
#: Environment variable of all processes of a suite: SUITE/NAME/GENERATION.
MARK = "LOCKSTEP_CHAOS"
_ORPHANS_MAY_LIVE_S = 30.0
_BACK_OFF_S = 1.0


def belonging(mark: str, sessions: Collection[int]) -> dict[int, str]:
    """Return living processes whose mark begins with `mark`, or that belong to these sessions, and their names.

    Processes in every group inherit the mark, but a process that sets its title may overwrite it.
    """
    wanted, found = f"\0{MARK}={mark}".encode(), {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            state, _, _, session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            ours = int(session) in sessions or wanted in b"\0" + (path / "environ").read_bytes()
            if ours and state not in "ZX":
                found[int(path.name)] = (path / "comm").read_text().strip()
        except OSError:
            continue
    return found


def command_line(pid: int) -> bytes:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pids: Collection[int], number: signal.Signals = signal.SIGKILL) -> list[int]:
    """Send a signal to each process that is alive, and return those."""
    reached = []
    for pid in pids:
        try:
            os.kill(pid, number)
            reached.append(pid)
        except ProcessLookupError:
            continue
    return reached


@dataclass
class Supervised:
    """One command that is restarted, unchanged, whenever it ends.

    Args:
        report: called with a message when children outlive their parent.
        forever: restart it after status 0, too.

    Attributes:
        exits: generation, status and last log line of each process that ended.
        sessions: session of each generation.
    """

    suite: str
    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    report: Callable[[str], None]
    forever: bool = False
    exits: list[tuple[int, int, str]] = field(default_factory=list)
    generation: int = 0
    sessions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name=f"supervise-{self.name}", daemon=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.done = threading.Event()

    @property
    def mark(self) -> str:
        """Return the mark of the present generation."""
        return f"{self.suite}/{self.name}/{self.generation}/"

    @property
    def pid(self) -> int:
        """Return the id of the process itself."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> Supervised:
        """Start and supervise the command."""
        self._start()
        self._thread.start()
        return self

    def family(self) -> dict[int, str]:
        """Return living processes of the present generation, and their names."""
        return belonging(self.mark, self.sessions[-1:])

    def children(self, name: str = "") -> list[int]:
        """Return its living descendants whose name begins with `name`."""
        return [pid for pid, comm in self.family().items() if pid != self.pid and comm.startswith(name)]

    def kill(self) -> None:
        """Send SIGKILL to the process only, not to its children."""
        kill([self.pid])

    def stop(self) -> None:
        """End it without a restart: SIGTERM, later SIGKILL."""
        self._stopping.set()
        if self.process is not None and self.process.poll() is None:
            kill(self.family(), signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._thread.join()

    def tail(self, characters: int = 2000) -> str:
        """Return the end of its log."""
        with self.log.open("rb") as stream:
            stream.seek(max(self.log.stat().st_size - characters, 0))
            return stream.read().decode(errors="replace")

    def _start(self) -> None:
        self.generation += 1
        self.started = time.monotonic()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment, MARK: self.mark},
            )
        self.sessions.append(self.process.pid)

    def _supervise(self) -> None:
        while True:
            assert self.process is not None
            status = self.process.wait()
            self.exits.append((self.generation, status, _last_words(self.tail())))
            self._look_for_orphans()
            if status == 0 and not self.forever:
                return self.done.set()
            if self._stopping.wait(_BACK_OFF_S):
                return None
            self._start()

    def _look_for_orphans(self) -> None:
        """Report and kill children that do not end with their parent."""
        deadline = time.monotonic() + _ORPHANS_MAY_LIVE_S
        while left := self.family():
            if time.monotonic() > deadline:
                self.report(f"{self.name} has left processes behind: {left}")
                kill(left)
                return
            time.sleep(0.2)


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
