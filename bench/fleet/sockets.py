"""Bytes that this process has sent over TCP, as the kernel counts them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

#: Offset of `tcpi_bytes_sent` in the `tcp_info` of Linux 4.19 and later.
_BYTES_SENT = 200


def bytes_sent() -> int:
    """Return what this process's open TCP connections have sent, repeated packets included."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, struct.error):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
    return total
