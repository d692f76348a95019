"""HTTP servers of what watches a run, on threads; whoever opens connections gets no more than a few of them."""

from __future__ import annotations

import io
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from socketserver import ThreadingMixIn
from typing import Any, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from shared.bearer_tokens import is_loopback
from shared.errors import InvalidRequest
from shared.local_access import LocalAccess

#: In the environ of a request: a function to call once its sender has shown that it may be here.
KEEP = "lockstep.keep_connection"
_CONNECTIONS = 16
_SECONDS = 10.0
_OF_PAGES = ("HTTP_HOST", "HTTP_ORIGIN", "HTTP_SEC_FETCH_SITE")


def start_http_server(app: WSGIApplication, host: str, port: int, option: str) -> WSGIServer:
    """Serve `app` from a thread, until the process ends.

    Raises:
        LockstepError: `invalid_request` if it cannot be listened on; `option` gave the port.
    """
    try:
        server = make_server(host, port, app, _Server, handler_class=_Request)
    except (OSError, OverflowError) as error:
        raise InvalidRequest(
            f"{option} {port}: cannot listen on {host}:{port} ({error}); give another one, or leave it out"
        ) from error
    threading.Thread(target=server.serve_forever, name=option, daemon=True).start()
    return server


def local_only(app: WSGIApplication, host: str) -> WSGIApplication:
    """Return `app`, closed to pages of other sites where `host` is the loopback; a network was let in as it is."""
    if not is_loopback(host):
        return app
    access = LocalAccess(host)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        given = [[environ[name]] if name in environ else [] for name in _OF_PAGES]
        if (refusal := access.refusal(*given)) is None:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [refusal.encode()]

    return answer


class _Request(WSGIRequestHandler):
    timeout = _SECONDS  # of one read or write

    server: Any  # a `_Server`

    def get_environ(self) -> WSGIEnvironment:
        """Add `KEEP` to what the application is told."""
        return super().get_environ() | {KEEP: partial(self.server.keep, self.connection)}

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def get_stderr(self) -> TextIO:
        """Keep tracebacks from the terminal: a client that reads too slowly makes one."""
        return io.StringIO()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each of the `_CONNECTIONS` newest connections; older ones are closed.

    Those that are kept are counted apart: strangers close none of them.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._open, self._kept = OrderedDict[socket.socket, None](), OrderedDict[socket.socket, None]()
        self._lock = threading.Lock()
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            _add(self._open, request)
        super().process_request(request, client_address)

    def keep(self, request: socket.socket) -> None:
        """Count a connection apart from those whose senders may be anybody."""
        with self._lock:
            if request in self._open:
                del self._open[request]
                _add(self._kept, request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
            self._kept.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: a client was too slow, or has left."""


def _add(connections: OrderedDict[socket.socket, None], request: socket.socket) -> None:
    if len(connections) >= _CONNECTIONS:
        oldest, _ = connections.popitem(last=False)
        with suppress(OSError):  # it has ended by itself
            oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
    connections[request] = None
