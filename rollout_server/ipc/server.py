"""The worker's end of the socket between a worker and the HTTP server: JSON lines, one thread per operation.

Request: {"id", "op", **arguments}. Replies, in any order: {"id", "acknowledged": true} at most once, then
{"id", "result": {...}} once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout_server.ipc.lines import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES
from shared.errors import InstallFailed, LockstepError

Acknowledge = Callable[[], None]
#: Called with an `Acknowledge` and the request's arguments.
Operation = Callable[..., dict[str, Any] | None]


def serve(folder: Path, operations: dict[str, Operation]) -> None:
    """Listen on a socket in `folder` and serve the one server that connects, on threads of their own."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Hidden until it listens, so that a socket that can be seen can be connected to.
    hidden = folder / f".{os.getpid()}"
    listener.bind(str(hidden))
    listener.listen(1)
    hidden.rename(folder / f"{os.getpid()}.sock")
    threading.Thread(target=_read, args=(listener, operations), name="lockstep-link", daemon=True).start()


def _read(listener: socket.socket, operations: dict[str, Operation]) -> None:
    connection, _ = listener.accept()
    listener.close()
    lock = threading.Lock()
    try:
        requests = connection.makefile("rb")
        while line := requests.readline(MAX_REQUEST_BYTES + 1):
            if len(line) > MAX_REQUEST_BYTES:
                raise ValueError(f"a request has over {MAX_REQUEST_BYTES} bytes")
            request = json.loads(line)
            args = (operations, request.pop("op"), request.pop("id"), request, connection, lock)
            threading.Thread(target=_run, args=args, name="lockstep-operation", daemon=True).start()
    except Exception:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # the server must not wait for answers that cannot come


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
