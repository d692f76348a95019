"""The worker's end of the socket between a worker and the HTTP server: JSON lines, one thread for each operation.

Request: {"id", "op", **arguments}. Answers, in any order: {"id", "event": {...}} as often as the operation tells
something, then {"id", "answer": {...}} once.
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

Tell = Callable[[dict[str, Any]], None]
Operation = Callable[..., dict[str, Any]]


def serve(folder: Path, operations: dict[str, Operation]) -> None:
    """Listen on a socket in `folder` and answer the one server that connects, on threads of their own."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Hidden until it listens, so that whoever sees it can connect.
    hidden = folder / f".{os.getpid()}"
    listener.bind(str(hidden))
    listener.listen(1)
    hidden.rename(folder / f"{os.getpid()}.sock")
    threading.Thread(target=_answer, args=(listener, operations), name="lockstep-link", daemon=True).start()


def _answer(listener: socket.socket, operations: dict[str, Operation]) -> None:
    connection, _ = listener.accept()
    listener.close()
    out, lock = connection.makefile("wb", buffering=0), threading.Lock()
    for line in connection.makefile("rb"):
        request = json.loads(line)
        args = (operations[request.pop("op")], request.pop("id"), request, out, lock)
        threading.Thread(target=_run, args=args, name="lockstep-operation", daemon=True).start()


def _run(operation: Operation, call: int, arguments: dict[str, Any], out: BinaryIO, lock: threading.Lock) -> None:
    def send(kind: str, content: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps({"id": call, kind: content}).encode() + b"\n")

    try:
        answer = operation(lambda event: send("event", event), **arguments)
    except LockstepError as error:
        answer = _refused(error)
    except Exception as error:
        traceback.print_exc()
        answer = _refused(InstallFailed(f"{type(error).__name__}: {error}"))
    send("answer", answer)


def _refused(error: LockstepError) -> dict[str, Any]:
    return {"ok": False, "code": error.code.value, "message": error.message}
