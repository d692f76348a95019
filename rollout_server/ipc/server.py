"""The worker's end of the link between a worker and the HTTP server: JSON lines, one thread per operation.

Request: {"id", "op", **arguments}, or with "payload": N, and N bytes after the line, which the operation gets. Replies,
in any order: {"id", "acknowledged": true} at most once, then {"id", "result": {...}} once.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from rollout_server.ipc import tcp
from rollout_server.ipc.lines import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, MAX_REQUEST_BYTES
from shared.errors import InstallFailed, LockstepError

Acknowledge = Callable[[], None]
#: Called with an `Acknowledge` and the request's arguments.
Operation = Callable[..., dict[str, Any] | None]
#: The server connects once the slowest worker listens, for which it waits 600 s.
_SERVER_S = 720.0
#: Connections that prove themselves at the same time.
_ADMITTING = 32
_LOOK_S = 0.1


def serve(folder: Path, operations: dict[str, Operation]) -> None:
    """Listen on a Unix socket in `folder` and serve the one server that connects, on threads of their own."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Hidden until it listens, so that a socket that can be seen can be connected to.
    hidden = folder / f".{os.getpid()}"
    listener.bind(str(hidden))
    listener.listen(1)
    hidden.rename(folder / f"{os.getpid()}.sock")

    def run() -> None:
        connection, _ = listener.accept()
        listener.close()
        _read(connection, operations)

    threading.Thread(target=run, name="lockstep-link", daemon=True).start()


def serve_over_tcp(host: str, secret: bytes, operations: dict[str, Operation], ended: Callable[[], None]) -> int:
    """Listen on a port of the address `host` and serve the one server that knows `secret`; return the port.

    The port closes with the server's connection. Whoever does not know the secret is disconnected within
    `tcp.HANDSHAKE_S`.

    Args:
        ended: called when the server has gone, or none has come within `_SERVER_S`.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=16)

    def run() -> None:
        try:
            if (connection := _admitted(listener, secret)) is not None:
                _read(connection, operations)
        finally:
            ended()

    threading.Thread(target=run, name="lockstep-link", daemon=True).start()
    return int(listener.getsockname()[1])


def _admitted(listener: socket.socket, secret: bytes) -> socket.socket | None:
    """Return the server's connection, and close the port; None if it has not come in time."""
    found: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    deadline, room = time.monotonic() + _SERVER_S, threading.Semaphore(_ADMITTING)

    def admit(connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                if tcp.admit(connection, secret):
                    tcp.end_when_silent(connection)
                    found.put(connection)
                    return
            connection.close()
        finally:
            room.release()

    with listener:
        listener.settimeout(_LOOK_S)
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                if room.acquire(blocking=False):  # side by side: who says nothing keeps nobody waiting
                    threading.Thread(target=admit, args=(connection,), name="lockstep-admission", daemon=True).start()
                else:  # the server tries again
                    connection.close()
            with contextlib.suppress(queue.Empty):
                return found.get_nowait()
    return None


def _read(connection: socket.socket, operations: dict[str, Operation]) -> None:
    """Run the operations that come on a connection, until its other end has closed it."""
    lock = threading.Lock()
    try:
        requests = connection.makefile("rb")
        while line := requests.readline(MAX_REQUEST_BYTES + 1):
            if len(line) > MAX_REQUEST_BYTES:
                raise ValueError(f"a request has over {MAX_REQUEST_BYTES} bytes")
            request = json.loads(line)
            if payload := request.pop("payload", 0):
                request["payload"] = _payload(requests, payload)
            args = (operations, request.pop("op"), request.pop("id"), request, connection, lock)
            threading.Thread(target=_run, args=args, name="lockstep-operation", daemon=True).start()
    except Exception:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # the server must not wait for answers that cannot come


def _payload(requests: BinaryIO, count: int) -> bytes:
    if not 0 < count <= MAX_PAYLOAD_BYTES:
        raise ValueError(f"a request announces {count} bytes after its line, and {MAX_PAYLOAD_BYTES} are read")
    if len(payload := requests.read(count)) < count:
        raise EOFError(f"{count} bytes should follow a request, and {len(payload)} came")
    return payload


def _run(
    operations: dict[str, Operation],
    op: str,
    request_id: int,
    arguments: dict[str, Any],
    connection: socket.socket,
    lock: threading.Lock,
) -> None:
    def send(**reply: Any) -> None:
        line = json.dumps({"id": request_id, **reply}).encode() + b"\n"
        if len(line) > MAX_ANSWER_BYTES:
            raise InstallFailed(f"the answer to {op} has {len(line)} bytes, and {MAX_ANSWER_BYTES} are read")
        with lock:
            connection.sendall(line)

    try:
        send(result={"ok": True, **(operations[op](lambda: send(acknowledged=True), **arguments) or {})})
    except BaseException as error:
        if not isinstance(error, LockstepError):
            traceback.print_exc()
            error = InstallFailed(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # the server is gone, and this process about to be
            send(result={"ok": False, "code": error.code.value, "message": error.message})
