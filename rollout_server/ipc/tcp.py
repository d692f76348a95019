"""Links over TCP: both ends prove that they know the engine's secret, and notice when the other's host has gone.

The worker sends a nonce; the server, a nonce of its own and an HMAC over both; the worker, another HMAC. Nothing else
is read before that, and all lengths are fixed. Between hosts (`ipc.hosts`) the head is the one who listens, as a worker
is here. What follows is neither encrypted nor signed: like NCCL's connections
and vLLM's own, these need a network of their own.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import time

SECRET_BYTES = 32
#: In which the workers find the secret, as hex digits. Whatever vLLM sends to all workers, anyone may read who reaches
#: the port that it publishes on.
VARIABLE = "LOCKSTEP_ENGINE_SECRET"
#: For the handshake of one connection, seconds.
HANDSHAKE_S = 10.0
_NONCE_BYTES = _PROOF_BYTES = 32
# A host that has lost its power, or its network, sends nothing that would end a connection.
_IDLE_S, _PROBE_S, _PROBES, _UNACKNOWLEDGED_MS = 20, 10, 4, 60_000


def derived(token: str, purpose: str) -> bytes:
    """Return the secret that all hosts make of the token that each is given; it tells nothing of the token.

    Args:
        purpose: what it is for; another purpose gives another secret. Addresses are no part of it: hosts may spell
            the head's in several ways.
    """
    return hmac.digest(token.encode(), b"lockstep engine secret, 1: " + purpose.encode(), "sha256")


def admit(connection: socket.socket, secret: bytes) -> bool:
    """Return whether a connection to a worker is the server's, to which the worker proves itself then.

    Raises:
        OSError: it has ended, or taken longer than `HANDSHAKE_S`.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    nonce = os.urandom(_NONCE_BYTES)
    connection.settimeout(HANDSHAKE_S)
    connection.sendall(nonce)
    answer = _receive(connection, _NONCE_BYTES + _PROOF_BYTES, deadline)
    nonces = nonce + answer[:_NONCE_BYTES]
    if not hmac.compare_digest(answer[_NONCE_BYTES:], _proof(secret, b"server", nonces)):
        return False
    connection.sendall(_proof(secret, b"worker", nonces))
    connection.settimeout(None)
    return True


async def admit_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> bool:
    """As `admit`, on an event loop.

    Raises:
        OSError, EOFError: the other end has ended the connection, or taken longer than `HANDSHAKE_S`.
    """
    nonce = os.urandom(_NONCE_BYTES)
    async with asyncio.timeout(HANDSHAKE_S):
        writer.write(nonce)
        nonces = nonce + await reader.readexactly(_NONCE_BYTES)
        if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), _proof(secret, b"server", nonces)):
            return False
    writer.write(_proof(secret, b"worker", nonces))
    return True


async def introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> None:
    """Prove to a worker that this is its server, and let it prove itself.

    Raises:
        OSError, EOFError: it has ended the connection, or does not know the secret.
    """
    theirs, ours = await reader.readexactly(_NONCE_BYTES), os.urandom(_NONCE_BYTES)
    writer.write(ours + _proof(secret, b"server", theirs + ours))
    if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), _proof(secret, b"worker", theirs + ours)):
        raise ConnectionError("the other end does not know this engine's secret")


def end_when_silent(connection: socket.socket) -> None:
    """Let a connection end a minute after the other's host has gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": _IDLE_S,
        "TCP_KEEPINTVL": _PROBE_S,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": _UNACKNOWLEDGED_MS,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not all of them everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, role + nonces, "sha256")


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    received = b""
    while len(received) < count:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (part := connection.recv(count - len(received))):
            raise ConnectionError("the other end has closed the connection")
        received += part
    return received
