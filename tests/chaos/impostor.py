"""A server of a later version at the address of a rollout server: ready, but with another protocol."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from shared import PROTOCOL_VERSION


class Impostor:
    """Responds as a rollout server of a later version.

    Attributes:
        asked: requests received, and whether they would have changed anything.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        asked: list[tuple[str, bool]] = []
        answer = json.dumps({**state, "protocol": PROTOCOL_VERSION + 1, "runs": []}).encode()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                asked.append((f"{self.command} {self.path}", self.command != "GET"))
                known = self.path in ("/ready", "/health", "/v1/state")
                body = answer if self.path == "/v1/state" else b"" if known else b'{"detail":"Not Found"}'
                self.send_response(200 if known else 404)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = _answer

            def log_message(self, *_: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                return  # the suite resets its connections, too

        self.asked = asked
        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
