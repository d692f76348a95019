"""Serves the page of runs and sends it what is new: it reads run directories; nothing is written through it."""

from __future__ import annotations

import atexit
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIEnvironment

from learner.monitors.http_server import KEEP, local_only, start_http_server
from learner.monitors.run_page import batch_changes, html_json, policy, render
from learner.monitors.run_reader import RunReader, find_runs
from shared.bearer_tokens import is_loopback

#: Seconds between two looks at the files, while somebody watches; and between two signs of life of a quiet stream.
_LOOK, _ALIVE = 0.5, 5.0
#: Most runs in one view, and runs whose data is kept.
_VIEWED, _KEPT = 8, 16
#: Variable with the port that `learner up` has chosen, which somebody else may have when it is listened on.
CHOSEN_PORT = "LOCKSTEP_CHOSEN_PAGE_PORT"
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Content-Security-Policy", f"{policy(live=True)}; frame-ancestors 'none'"),
]


def serve_page(folder: Path, host: str, port: int, option: str = "page_port") -> str:
    """Serve the page of the run, or the runs, at `folder` from a thread until the process ends; returns its URL.

    On the loopback it does not answer to pages of other sites. Elsewhere it answers to whoever has the URL, which then
    holds a secret.

    Args:
        port: 0 takes a free one.

    Raises:
        LockstepError: `invalid_request` if it cannot be listened on; `option` gave the port.
    """
    secret = None if is_loopback(host) else secrets.token_urlsafe(24)
    app = PageApp(folder, secret)
    server = start_http_server(local_only(app, host), host, port, option)
    atexit.register(app.send_last)
    return page_url(host, server.server_port, secret)


def page_url(host: str, port: int, secret: str | None = None) -> str:
    """Return the URL of a page that is served there; of a wildcard address, with this machine's name."""
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={secret}" if secret else "")


class PageApp:
    """The WSGI application: `/`, the page, and `/events`, a stream of server-sent events with the data of runs.

    `/events?run=NAME&run=...` sends `runs`, the names of all; then for each of these runs, by default the newest, a
    message with everything, and others with what has changed since: the parts of `learner.monitors.run_page.render`.
    """

    def __init__(self, folder: Path, secret: str | None = None) -> None:
        self._folder, self._secret = folder, secret
        self._readers: dict[str, RunReader] = {}
        self._lock = threading.Lock()
        self._leaving, self._watched = threading.Event(), threading.Condition()
        self._watchers = 0
        self._page = render({}, live=True).encode()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def answer(status: str, body: bytes, kind: str = "text/plain; charset=utf-8", **more: str) -> list[bytes]:
            headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS]
            start_response(status, [*headers, *((name.replace("_", "-"), value) for name, value in more.items())])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        path, query = environ.get("PATH_INFO") or "/", parse_qs(environ.get("QUERY_STRING", ""))
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return answer("405 Method Not Allowed", b"this page can only be read\n", Allow="GET, HEAD")
        if self._secret is not None:
            if path == "/" and self._is_secret(query.get("token", [""])[0]):
                cookie = f"{_cookie_name(environ)}={self._secret}; Path=/; HttpOnly; SameSite=Lax"
                return answer("303 See Other", b"", Location="/", Set_Cookie=cookie)
            if not self._is_secret(_cookie(environ)):
                return answer("401 Unauthorized", b"open the URL that the log shows, which has a token\n")
            environ.get(KEEP, bool)()
        if path == "/":
            return answer("200 OK", self._page, "text/html; charset=utf-8")
        if path != "/events":
            return answer("404 Not Found", b"there are / and /events\n")
        runs, names = find_runs(self._folder), query.get("run", [])[:_VIEWED]
        if unknown := [name for name in names if name not in runs]:
            return answer("404 Not Found", f"no run {unknown[0][:200]!a} here\n".encode())
        start_response("200 OK", [("Content-Type", "text/event-stream; charset=utf-8"), *_HEADERS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else self._events(names)

    def send_last(self, within_s: float = 2.0) -> None:
        """Let each stream look at the files once more, and end, before this process does."""
        self._leaving.set()
        with self._watched:
            self._watched.wait_for(lambda: not self._watchers, within_s)

    def _events(self, names: list[str]) -> Iterator[bytes]:
        with self._watched:
            self._watchers += 1
        try:
            yield from self._looks(names)
        finally:
            with self._watched:
                self._watchers -= 1
                self._watched.notify_all()

    def _looks(self, names: list[str]) -> Iterator[bytes]:
        yield b"retry: 2000\n\n"
        listed: dict[str, Path] | None = None
        sent: dict[str, dict[str, Any]] = {}
        spoke = time.monotonic()
        is_last = False
        while not is_last:
            is_last = self._leaving.is_set()
            if (runs := find_runs(self._folder)) != listed:
                listed = runs
                yield _event("runs", list(runs))
                spoke = time.monotonic()
            if not names and runs:
                names = [max(runs, key=lambda name: _changed_at(runs[name]))]
            for name in names:
                if name in runs and (message := self._message(name, runs[name], sent.setdefault(name, {}))):
                    yield _event("run", message)
                    spoke = time.monotonic()
            if time.monotonic() - spoke >= _ALIVE:
                yield b": nothing new\n\n"  # fails where nobody listens any more, which ends this thread
                spoke = time.monotonic()
            self._leaving.wait(0.0 if is_last else _LOOK)

    def _message(self, name: str, folder: Path, sent: dict[str, Any]) -> dict[str, Any] | None:
        """Return what has changed of a run since the state that `sent` keeps; None if nothing."""
        with self._lock:
            reader = self._readers.pop(name, None) or RunReader(folder, name)
            self._readers[name] = reader  # the last one is the newest
            while len(self._readers) > _KEPT:
                self._readers.pop(next(iter(self._readers)))
            reader.refresh()
            view, head = reader.view, reader.view.head()
            since = sent.get("at") if sent.get("generation") == reader.generation else None
            sent["at"], table = view.table.changes(since)
            sent["generation"] = reader.generation
            sent["batches"], batches = batch_changes(view.batches, sent.get("batches"))
        parts = {"head": head if head != sent.get("head") else None, "table": table, "batches": batches}
        sent["head"] = head
        changed = {part: value for part, value in parts.items() if value is not None}
        return {"run": name, **changed} if changed else None

    def _is_secret(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), (self._secret or "").encode())


def _event(kind: str, data: Any) -> bytes:
    return f"event: {kind}\ndata: {html_json(data)}\n\n".encode()


def _cookie(environ: WSGIEnvironment) -> str:
    try:
        found = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(_cookie_name(environ))
    except CookieError:
        return ""
    return found.value if found else ""


def _cookie_name(environ: WSGIEnvironment) -> str:
    """Return a name of this page's own: browsers send a host's cookies to all of its ports."""
    return f"lockstep_page_{environ['SERVER_PORT']}"


def _changed_at(folder: Path) -> int:
    try:
        return max(entry.stat().st_mtime_ns for entry in folder.iterdir())
    except (OSError, ValueError):
        return 0
