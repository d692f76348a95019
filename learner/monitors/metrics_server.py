"""HTTP server of the learner's metrics, on threads; whoever opens connections gets no more than a few of them."""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import WSGIApplication

_CONNECTIONS = 16
_SECONDS = 10.0


def start_metrics_server(app: WSGIApplication, host: str, port: int) -> WSGIServer:
    """Serve `app` from a thread, until the process ends; raises OSError, OverflowError."""
    server = make_server(host, port, app, _Server, handler_class=_Request)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


class _Request(WSGIRequestHandler):
    timeout = _SECONDS  # of one read or write

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each of the `_CONNECTIONS` newest connections; older ones are closed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._open = OrderedDict[socket.socket, None]()
        self._lock = threading.Lock()
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= _CONNECTIONS:
                oldest, _ = self._open.popitem(last=False)
                with suppress(OSError):  # it has ended by itself
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: a client was too slow, or has left."""
