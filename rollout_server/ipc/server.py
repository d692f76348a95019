"""The worker's end of the socket between a worker and the HTTP server: JSON lines, one thread per operation.

Request: {"id", "op", **arguments}. Replies, in any order: {"id", "acknowledged": true} at most once, then
{"id", "result": {...}} once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

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
    out, lock = connection.makefile("wb", buffering=0), threading.Lock()
    for line in connection.makefile("rb"):
        request = json.loads(line)
        args = (operations[request.pop("op")], request.pop("id"), request, out, lock)
        threading.Thread(target=_run, args=args, name="lockstep-operation", daemon=True).start()


def _run(operation: Operation, request_id: int, arguments: dict[str, Any], out: BinaryIO, lock: threading.Lock) -> None:
    def send(**reply: Any) -> None:
        with lock:
            out.write(json.dumps({"id": request_id, **reply}).encode() + b"\n")

    try:
        result = {"ok": True, **(operation(lambda: send(acknowledged=True), **arguments) or {})}
    except Exception as error:
        if not isinstance(error, LockstepError):
            traceback.print_exc()
            error = InstallFailed(f"{type(error).__name__}: {error}")
        result = {"ok": False, "code": error.code.value, "message": error.message}
    send(result=result)
