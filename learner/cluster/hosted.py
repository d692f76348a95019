"""A command on a machine of the cluster, as an actor: it is started, watched, started again, and ended there."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import socket
import ssl
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from learner.cluster.secret_files import SecretFile
from learner.utils.processes import ProcessGroup, module_command, module_environment
from shared.errors import NotReady
from shared.messages import one_line

#: Lines that are kept until somebody has asked for them.
_MOST_LINES = 20_000
_POLL_S, _READY_TIMEOUT_S, _LIST_S = 0.5, 5.0, 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


def place(name: str) -> str:
    """Return what stands in a command for something that only its node knows. No argument can hold such characters."""
    return f"\0{name}\0"


@dataclass(frozen=True)
class Command:
    """A module of ours to run on another machine.

    In `arguments` and `url`, `place("host")` and `place("port")` stand for the node's address and a free port there,
    and `place(NAME)` for the path of the file with that secret.

    Attributes:
        secrets: contents of files, by name: tokens, certificates, keys.
        defaults: environment variables, unless they are set on the node.
        environment: those that are set in any case.
        directory: to run in, where the node has it.
        url: where it listens; empty: nowhere. It is ready when /ready below that says so.
        patience_s: seconds that it gets to end by itself.
        again: start it again when it has ended.
    """

    module: str
    arguments: tuple[str, ...]
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    defaults: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = ""
    url: str = ""
    patience_s: float = 15.0
    again: bool = False


@dataclass(frozen=True)
class Report:
    """How a hosted command stands.

    Attributes:
        life: changes when the actor begins anew, on the same node or another.
        changes: of all that is reported.
        port: one of its node, which was free when it was started: `place("port")`.
        lines: what it has said since the last report; `seen` counts all.
        starts, ended: times that it was started, and has ended.
        ready: it has answered, and not ended since.
        status, reason: of its last end: exit status, negative for a signal, and what it said last.
        pause_s: before it is started again.
        over: it will not be started again.
    """

    life: str
    node: str
    changes: int = 0
    url: str = ""
    port: int = 0
    lines: tuple[str, ...] = ()
    seen: int = 0
    starts: int = 0
    ended: int = 0
    ready: bool = False
    status: int | None = None
    reason: str = ""
    pause_s: float = 0.0
    over: bool = False


class Hosted:
    """Runs a command until it is told to end it, or the actor ends; the process does not outlive the actor.

    Args:
        host: address of this node.
        environment: of Ray's, for the command.
        on_ready: called with the URL whenever it has become ready.
    """

    def __init__(
        self,
        command: Command,
        host: str,
        environment: Mapping[str, str] | None = None,
        on_ready: Callable[[str], object] = lambda url: None,
    ) -> None:
        self._command, self._host, self._on_ready = command, host, on_ready
        self._environment = dict(environment or {})
        self._changed = threading.Condition(threading.RLock())
        self._lines = deque[str](maxlen=_MOST_LINES)
        self._report = Report(secrets.token_hex(4), host)
        self._last, self._port, self._unlisted = "", 0, ""
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._patience_s = command.patience_s
        # The kernel ends the command with the thread that has started it: this one lives as long as the actor.
        self._thread = threading.Thread(target=self._run, name="lockstep-hosted", daemon=True)
        self._thread.start()

    def report(self, life: str = "", changes: int = 0, seen: int = 0, wait_s: float = 0.0) -> Report:
        """Return how it stands, as soon as the asker does not know it, or after `wait_s`.

        Args:
            life, changes, seen: of the asker's last report.
        """
        with self._changed:
            if life != self._report.life:
                changes = seen = 0
            self._changed.wait_for(lambda: self._report.changes > changes, wait_s)
            missing = min(self._report.seen - seen, len(self._lines))
            return replace(self._report, lines=tuple(self._lines)[len(self._lines) - missing :])

    def end(self, patience_s: float | None = None) -> None:
        """End it, and start it no more; a second call with 0 leaves it no more time."""
        if patience_s is not None:
            self._patience_s = patience_s
        self._stop.set()
        if patience_s == 0.0:
            self._hurry.set()

    def _change(self, **values: Any) -> None:
        with self._changed:
            self._report = replace(self._report, changes=self._report.changes + 1, **values)
            self._changed.notify_all()

    def _take(self, line: str) -> None:
        if line.strip() and not line.startswith("INFO:"):
            self._last = line
        with self._changed:
            self._lines.append(line)
            self._change(seen=self._report.seen + 1)

    def _run(self) -> None:
        failures = 0
        while True:
            self._last = ""
            try:
                was_ready, status = self._run_once()
            except Exception as error:  # no such directory, no process can be started, no port
                self._last, was_ready, status = one_line(error), False, 1
            failures = 1 if was_ready else failures + 1
            pause = min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S)
            over = self._stop.is_set() or not self._command.again
            ended = self._report.ended + 1
            self._change(ready=False, status=status, reason=self._last, ended=ended, pause_s=pause, over=over)
            if over or self._stop.wait(pause):
                self._change(over=True)
                return

    def _run_once(self) -> tuple[bool, int]:
        """Start it and wait for its end; return whether it was ready, and its exit status."""
        command, ready = self._command, False
        with contextlib.ExitStack() as files:
            places = {"host": self._host, "port": str(self._free_port())}
            for name, content in command.secrets.items():
                places[name] = files.enter_context(contextlib.closing(SecretFile(content, name))).path
            url, *words = (_put(word, places) for word in (command.url, *command.arguments))
            environment = {**command.defaults, **os.environ, **module_environment(), **command.environment}
            if command.directory and os.path.isdir(command.directory):
                os.chdir(command.directory)
            group = ProcessGroup(
                [*module_command(command.module), *words],
                environment | self._environment,
                self._take,
                patience_s=self._patience_s,
                hurry=self._hurry,
            )
            self._change(starts=self._report.starts + 1, url=url, port=self._port)
            try:
                listed_at = 0.0
                while group.process.poll() is None and not self._stop.wait(_POLL_S):
                    if ready and time.monotonic() > listed_at + _LIST_S:  # who lists it may have begun anew
                        listed_at = time.monotonic()
                        self._is_listed(url)
                    if url and not ready and _is_ready(url) and self._is_listed(url):
                        ready, listed_at = True, time.monotonic()
                        self._change(ready=True)
            finally:
                group.patience_s = self._patience_s
                status = group.end()
        return ready, status

    def _is_listed(self, url: str) -> bool:
        try:
            self._on_ready(url)
        except Exception as error:  # of ours or of Ray, tried again: the command is well
            if (problem := one_line(error)) != self._unlisted:
                self._unlisted = problem
                self._take(f"not listed: {problem}")
            return False
        self._unlisted = ""
        return True

    def _free_port(self) -> int:
        """Return the port of before if it is free, so that a learner finds the server where it was."""
        for port in (self._port, 0):
            with contextlib.suppress(OSError), socket.create_server((self._host, port)) as probe:
                self._port = probe.getsockname()[1]
                return self._port
        raise NotReady(f"no port is free on {self._host}")


def _put(word: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        word = word.replace(place(name), value)
    return word


def _is_ready(url: str) -> bool:
    """Return whether a server answers there. Whether it is the right one, its certificate tells its clients."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"{url}/ready", timeout=_READY_TIMEOUT_S) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException) as error:
        return getattr(error, "code", None) == 401  # whose token is missing, its clients say
