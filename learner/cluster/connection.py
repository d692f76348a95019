"""Connection of this process to a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from shared.errors import InvalidRequest, NotReady
from shared.messages import one_line

#: Of all named actors of ours.
NAMESPACE = "lockstep"
#: Ray's own variable; it is set for the processes that run on a cluster.
ADDRESS_VARIABLE = "RAY_ADDRESS"
_INSTALL = "pip install 'lockstep-rl[cluster]'"
_ANSWER_S = 30.0
_connecting = threading.Lock()


def import_ray() -> Any:
    """Return the module `ray`; raises `invalid_request` if it is not installed."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what it will do one day is said at every actor
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a call after a lost connection begins a cluster here
    try:
        import ray
    except ImportError as error:
        raise InvalidRequest(f"Ray is not installed here ({error}): {_INSTALL}") from error
    return ray


def connect(address: str = "auto") -> Any:
    """Return the module `ray`, connected; a process that is connected stays so.

    Args:
        address: `auto` for $RAY_ADDRESS or the cluster that this machine is a node of, `HOST:6379`, or
            `ray://HOST:10001` from a machine that is no node.

    Raises:
        InvalidRequest: no Ray here, or no cluster there.
    """
    ray = import_ray()
    with _connecting:
        if ray.is_initialized():
            return ray
        if address == "auto":
            address = os.environ.get(ADDRESS_VARIABLE) or address
        _check_listens(address)
        try:
            with _own_signals():
                ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # of gRPC, of Ray, and of what both call, of any kind
            hint = "; `ray start --head` begins one" if address == "auto" else ""
            raise InvalidRequest(f"no Ray cluster at {address}: {one_line(error)}{hint}") from error
    return ray


def answer(ray: Any, reference: Any, what: str, timeout_s: float = _ANSWER_S) -> Any:
    """Return what an actor answers; raises `not_ready` if it does not within `timeout_s`, or is no more."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise NotReady(f"{what} does not answer within {timeout_s:g} s") from error
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise NotReady(f"{what} does not answer: {one_line(error)}") from error


def last_line(error: Exception) -> str:
    """Return why an actor is no more: what it raised stands last in Ray's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else one_line(error)


def _check_listens(address: str) -> None:
    """Raise `invalid_request` unless something listens at an address with a port: Ray would try for minutes."""
    if address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise InvalidRequest(f"--cluster {address!r} is none of auto, HOST:6379 and ray://HOST:10001")
    try:
        socket.create_connection((host, port), timeout=10.0).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise InvalidRequest(f"no Ray cluster at {address}: {why}") from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray replaces by one that exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
