"""Ports of the loopback on this machine."""

from __future__ import annotations

import socket


def check_port(port: int) -> None:
    """Raise `OSError`, or `OverflowError` for a number that is no port, unless it can be listened on now."""
    socket.create_server(("127.0.0.1", port)).close()


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
