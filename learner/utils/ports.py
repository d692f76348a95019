"""Ports of the loopback on this machine."""

from __future__ import annotations

import contextlib
import os
import socket


def check_port(port: int) -> None:
    """Raise `OSError`, or `OverflowError` for a number that is no port, unless it can be listened on now."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:  # whose text says at length what the caller knows
        raise OSError(error.errno, os.strerror(error.errno or 0)) from error


def free_port(preferred: int = 0) -> int:
    """Return a port that nothing listens on now, `preferred` if it is one."""
    if preferred:
        with contextlib.suppress(OSError):
            check_port(preferred)
            return preferred
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
