"""A TCP proxy between learner and rollout servers, as a separate process, that breaks connections in every way.

It parses requests only to recognize pushes and receipts: it can hold a push halfway, stores every adapter that passes
(`FOLDER/pushes/FENCE.STEP.blob`) before its last piece is forwarded, and records every receipt on its way to the
learner. Of a broadcast only the announcement, the word that the workers receive, and the receipt pass.

python -m tests.chaos.proxy FOLDER HOST UPSTREAM_PORT...     # controlled over FOLDER/control, see `tests.chaos.control`
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.wire import RECEIVING, marker
from tests.chaos.recording import Pushes

_PIECE = 4096
_PUSH = re.compile(rb"PUT /v1/runs/[^/ ]+/adapter ")
_BROADCAST = re.compile(rb"POST /v1/runs/[^/ ]+/broadcast ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RECEIVING, _INSTALLED = marker(RECEIVING), 0.75
#: The beginning of a PushReceipt.
_RECEIPT = re.compile(
    rb'\{"epoch":"(\w+)","version":\{"run_id":"[^"]+","fence":(\d+),"step":(\d+)\},"install_seq":\d+,"checksum":"(\w+)"'
)


class Requests:
    """The requests of one connection, split into pieces."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self.push: bytearray | None = None  #: body of the push in progress, as far as received
        self.broadcast = False  #: the last request announced a broadcast
        self.length = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield `data` in pieces that do not cross the end of a request."""
        while data:
            if not self._left:
                known = len(self._head)
                self._head += data
                end = self._head.find(b"\r\n\r\n")
                if end < 0:
                    yield data
                    return
                piece, data = data[: end + 4 - known], data[end + 4 - known :]
                self._begin(bytes(self._head[: end + 4]))
                self._head.clear()
            else:
                piece, data = data[: min(self._left, _PIECE)], data[min(self._left, _PIECE) :]
                self._left -= len(piece)
                if self.push is not None:
                    self.push += piece
            yield piece

    def _begin(self, head: bytes) -> None:
        length = _LENGTH.search(head)
        self._left = self.length = int(length[1]) if length else 0
        self.push = bytearray() if _PUSH.match(head) else None
        self.broadcast = bool(_BROADCAST.match(head))

    @property
    def complete_push(self) -> bytes | None:
        """Return the push that the last piece completed, if any."""
        complete = self.push is not None and len(self.push) == self.length
        return bytes(self.push) if complete and self.push else None


class Connection:
    """One connection of the learner, and the proxy's to the server."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.requests = Requests()
        self.swallows = False  #: half-open: drops all data, without an error
        self.left: list[int | None] = [None, None]  #: bytes still to forward to the server, to the learner

    def abort(self) -> None:
        """Reset both sides."""
        for writer in self.writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        """Close both sides."""
        for writer in self.writers:
            writer.close()


class Link:
    """Route to one server. The suite may call its methods that begin with `do_`."""

    def __init__(self, proxy: Proxy, upstream: int) -> None:
        self.proxy, self.upstream, self.port = proxy, upstream, 0
        self.connections: set[Connection] = set()
        self.delay, self.refuses = 0.0, False
        self.passing, self.released, self.held = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.passing.set()
        self.hold_at: float | None = None
        self.hold_broadcast = False
        self._called = self._own_name = b""

    async def serve(self, host: str) -> None:
        """Listen on a free port."""
        server = await asyncio.start_server(self._accept, host, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._called = f" {host}:{self.port}\r\n".encode()
        self._own_name = f"127.0.0.1:{self.port}\r\n".rjust(len(self._called)).encode()

    async def do_reset(self) -> int:
        """Reset every connection; return how many."""
        for connection in (connections := list(self.connections)):
            connection.abort()
        return len(connections)

    async def do_half_open(self) -> int:
        """Drop all data on the present connections, without an error; return how many."""
        for connection in self.connections:
            connection.swallows = True
        return len(self.connections)

    async def do_refuse(self, on: bool) -> None:
        """Reset every new connection."""
        self.refuses = on

    async def do_block(self, on: bool) -> None:
        """Hold all data until the next call with False, then deliver it."""
        (self.passing.clear if on else self.passing.set)()

    async def do_delay(self, seconds: float) -> None:
        """Delay all data by this time."""
        self.delay = seconds

    async def do_cut(self, side: int, after: int) -> None:
        """End the present connections after `after` more bytes to the server (0) or to the learner (1)."""
        for connection in self.connections:
            connection.left[side] = after

    async def do_hold(self, at: float, timeout: float, broadcast: bool = False) -> bool:
        """Hold the next push when this share of its body has been forwarded; return whether one came in time.

        With `broadcast` hold the next one of those: while the workers receive, or, from a share of 0.75 on, when the
        server has installed what came, which the learner does not know.
        """
        self.held.clear()
        self.released.clear()
        self.hold_at, self.hold_broadcast = at, broadcast
        try:
            await asyncio.wait_for(self.held.wait(), timeout)
            return True
        except TimeoutError:
            return False
        finally:
            self.hold_at = None

    async def do_release(self) -> None:
        """Release a held push."""
        self.released.set()

    async def do_upstream(self, port: int) -> int:
        """Connect this address to another server; return the previous port."""
        before, self.upstream = self.upstream, port
        await self.do_reset()
        return before

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        try:
            if self.refuses:
                return connection.abort()
            await self.passing.wait()
            try:
                server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
            except OSError:
                return connection.abort()
            connection.writers = (writer, server_writer)
            self.connections.add(connection)
            both = [self._to_server(connection, reader, server_writer), self._back(connection, server_reader, writer)]
            tasks = [asyncio.ensure_future(pump) for pump in both]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if connection.swallows:  # the other side does not notice
                await asyncio.wait(tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self.connections.discard(connection)
            connection.close()
        return None

    async def _to_server(self, connection: Connection, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        requests = connection.requests
        while data := await _read(reader):
            for piece in requests.pieces(data):
                push, at = requests.push, self.hold_at
                if complete := requests.complete_push:
                    self.proxy.pushes.store(complete)
                if push and at is not None and not self.hold_broadcast and len(push) >= at * requests.length:
                    await self._hold()
                if not await self._pass(connection, 0, piece, to):
                    return
                if complete:
                    requests.push = None

    async def _back(self, connection: Connection, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        tail, requests = b"", connection.requests
        while data := await _read(reader):
            tail += data
            if requests.broadcast and self._holds(tail):
                await self._hold()
            for receipt in _RECEIPT.finditer(tail):
                self.proxy.saw_receipt(self, receipt, requests.broadcast)
                tail = tail[receipt.end() :]
            tail = tail[-300:]
            if not await self._pass(connection, 1, data, to):
                return

    def _holds(self, answer: bytes) -> bool:
        """Return whether this end of an answer to a broadcast is to be held."""
        if not self.hold_broadcast or self.hold_at is None:
            return False
        return bool(_RECEIPT.search(answer)) if self.hold_at >= _INSTALLED else _RECEIVING in answer

    async def _hold(self) -> None:
        self.held.set()
        await self.released.wait()

    async def _pass(self, connection: Connection, side: int, data: bytes, to: asyncio.StreamWriter) -> bool:
        """Forward a piece; return whether the connection goes on."""
        if side == 0:  # a server without tokens answers to the loopback's names only
            data = data.replace(self._called, self._own_name)
        await self.passing.wait()
        if self.delay:
            await asyncio.sleep(self.delay)
        if connection.swallows:
            return True
        left = connection.left[side]
        if left is not None:
            connection.left[side] = left - len(data[:left])
            data = data[:left]
        try:
            to.write(data)
            await to.drain()
        except OSError:
            return False
        return left is None or left > len(data)


class Proxy:
    """All links, and the pushes and receipts forwarded over them."""

    def __init__(self, folder: Path, upstreams: list[int]) -> None:
        self.links = [Link(self, port) for port in upstreams]
        self._folder = folder
        self.pushes = Pushes(folder)
        self._receipts: list[dict[str, Any]] = []

    async def run(self, host: str) -> None:
        """Serve until the process ends."""
        for link in self.links:
            await link.serve(host)
        server = await asyncio.start_unix_server(self._control, self._folder / "control")
        await server.serve_forever()

    def saw_receipt(self, link: Link, found: re.Match[bytes], broadcast: bool) -> None:
        """Record a receipt that is on its way to the learner."""
        epoch, fence, step, checksum = (part.decode() for part in found.groups())
        self._receipts.append(
            {
                "server": self.links.index(link),
                "epoch": epoch,
                "fence": int(fence),
                "step": int(step),
                "checksum": checksum,
                "broadcast": broadcast,
                "time": time.monotonic(),
            }
        )

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = json.loads(await reader.readline())
        do = asked.pop("do")
        if do == "ports":
            answer: Any = [link.port for link in self.links]
        elif do == "receipts":
            answer = self._receipts[asked["since"] :]
        else:
            link = self.links[asked.pop("server")]
            answer = await getattr(link, f"do_{do}")(**asked)
        writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(2**16)
    except OSError:
        return b""


if __name__ == "__main__":
    asyncio.run(Proxy(Path(sys.argv[1]), [int(port) for port in sys.argv[3:]]).run(sys.argv[2]))
