"""Connections to a server as no HTTP client makes them: what is sent on one, and what becomes of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
import time

import httpx

from tests.unit.rollout_server.api.served import TOKEN

LIMITS = {"first_byte_seconds": 2, "head_seconds": 3, "answer_seconds": 3, "left_seconds": 2, "stall_seconds": 3}
#: Kernels take some MiB of what is sent, whether the server reads it or not.
IN_FLIGHT_MIB = 16
REQUEST = b"POST /v1/generate HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
TOKEN_LINE = f"Authorization: Bearer {TOKEN}\r\n".encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: server\r\n\r\n"
#: Kind -> its beginning, what follows again and again, and the status that it gets.
ENDLESS_HEADS = {
    "header lines": (b"GET /health HTTP/1.1\r\n", b"X-Some-Header: some value\r\n" * 4096, 431),
    "short header lines": (b"GET /health HTTP/1.1\r\n", b"a:\r\n" * 16384, 431),
    "a header's name": (b"GET /health HTTP/1.1\r\nX", b"x" * 2**16, 431),
    "a header's value": (b"GET /health HTTP/1.1\r\nX: ", b"x" * 2**16, 431),
    "a URL": (b"GET /", b"x" * 2**16, 414),
    "a query": (b"GET /health?", b"x" * 1000, 414),
    "empty lines": (b"\r\n", b"\r\n" * 2**15, 431),
    "nothing that is HTTP": (b"\x00", b"\x00" * 2**16, 400),
    "a method": (b"G", b"G" * 2**16, 400),
}


def send(wire: socket.socket, first: bytes, more: bytes = b"", mib: int = 64) -> tuple[float, bytes]:
    """Send `first`, then `more` again and again, up to `mib`; return the MiB sent and all that was answered."""
    sent, answer = 0, b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        wire.sendall(first)
        while more and sent < mib * 2**20:
            sent += wire.send(more)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := wire.recv(2**16):
            answer += part
    return sent / 2**20, answer


def status(answer: bytes) -> int:
    """Return the status of an answer."""
    return int(answer.split()[1])


def answered(wire: socket.socket) -> int:
    """Read one whole answer; return its status."""
    answer = http.client.HTTPResponse(wire)
    answer.begin()
    answer.read()
    return answer.status


def closed_within(wire: socket.socket, seconds: float) -> bool:
    """Whether the server closes, whatever it sends before."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while (left := deadline - time.monotonic()) > 0:
            if select.select([wire], [], [], left)[0] and not wire.recv(2**16):
                return True
        return False
    return True


def local_port(response: httpx.Response) -> int:
    """Return our port of the connection that an answer came on."""
    return response.extensions["network_stream"].get_extra_info("client_addr")[1]


def generate(wire: socket.socket, **sampling: int) -> None:
    """Ask for a stream of groups; see `served`."""
    body = {"prompts": [{"token_ids": [1]}], "policy": "base", "stream": True, "sampling": sampling}
    content = json.dumps(body).encode()
    wire.sendall(REQUEST + TOKEN_LINE + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
