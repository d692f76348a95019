"""The server's end of the links to vLLM's workers: every call goes to all of them, every result is counted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rollout_server.ipc import tcp
from rollout_server.ipc.lines import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, MAX_REQUEST_BYTES
from rollout_server.ipc.memory import SharedMemory
from shared.errors import EngineDead, ErrorCode, InstallFailed, InvalidRequest, TooLarge, error_class

#: Parts of an adapter on their way to a host at the same time.
_PARTS = 4
_CONNECT_S, _RETRY_S = 60.0, 0.5
#: Numbers of copies, each larger than all before it.
_copies = itertools.count()


class WorkerAddress(NamedTuple):
    """Where a worker listens. Workers of the same `place` share memory: one node of one machine."""

    host: str
    port: int
    place: str


@dataclass(frozen=True)
class Workers:
    """All workers of all engines of this server.

    Attributes:
        addresses: where they listen, if the server reaches them over TCP; else it shares its memory with all of them.
    """

    links: list[_Link]
    addresses: list[WorkerAddress] = field(default_factory=list)

    @classmethod
    async def connect(cls, paths: list[Path], count: int, on_break: Callable[[EngineDead], None]) -> Workers:
        """Connect to the workers' sockets; raises `invalid_request` if fewer than `count` run on this host.

        Args:
            on_break: called with the reason when a link has ended: no push can succeed from then on.
        """
        if len(paths) != count:
            raise InvalidRequest(
                f"{len(paths)} of the engine's {count} workers run on this host; a rollout server reaches only those: "
                "choose a layout that fits on one host, or start several rollout servers"
            )
        limit, name = MAX_ANSWER_BYTES, "a worker of the engine"
        opened = [await asyncio.open_unix_connection(str(path), limit=limit) for path in paths]
        return cls([_Link(*ends, on_break, name) for ends in opened])

    @classmethod
    async def connect_over_tcp(
        cls, addresses: list[WorkerAddress], secret: bytes, on_break: Callable[[EngineDead], None]
    ) -> Workers:
        """Connect to workers that may be on other hosts, which know `secret`, in the order of their ranks.

        Raises:
            EngineDead: one of them cannot be reached within a minute.
        """
        names = [f"worker {rank} of the engine ({at.host}:{at.port})" for rank, at in enumerate(addresses)]
        opening = [asyncio.ensure_future(_open(at, secret, name)) for at, name in zip(addresses, names, strict=True)]
        try:
            opened = await asyncio.gather(*opening)
        except BaseException:
            for task in opening:
                task.cancel()
            for ends in await asyncio.gather(*opening, return_exceptions=True):
                if not isinstance(ends, BaseException):
                    ends[1].close()
            raise
        return cls([_Link(*ends, on_break, name) for ends, name in zip(opened, names, strict=True)], addresses)

    @property
    def host(self) -> str | None:
        """The address of the first worker's host, if the workers may be on several."""
        return self.addresses[0].host if self.addresses else None

    def close(self) -> None:
        """Close all links; nothing counts as broken from now on."""
        for link in self.links:
            link.close()

    def __len__(self) -> int:
        return len(self.links)

    def begin(self, op: str, **arguments: Any) -> WorkerCall:
        """Begin an operation (`worker.extension.Operations`) on all workers."""
        return self.begin_each(op, [arguments] * len(self))

    def begin_each(self, op: str, arguments: list[dict[str, Any]]) -> WorkerCall:
        """Begin an operation on the first `len(arguments)` workers, with arguments of their own."""
        return WorkerCall(op, [link.send(op, own) for link, own in zip(self.links, arguments, strict=False)])

    async def readable(self, memory: SharedMemory, size: int, timeout: float) -> list[tuple[str, int]]:
        """Let every worker read `size` bytes of the server's memory; return path and number of what each reads.

        Workers that are reached over TCP read a copy, which goes once to all workers of a place.

        Raises:
            LockstepError: as `WorkerCall.results`; also if a copy does not arrive within `timeout` seconds.
        """
        if not self.addresses:
            return [(memory.path, memory.number)] * len(self)
        firsts: dict[str, int] = {}
        for rank, address in enumerate(self.addresses):
            firsts.setdefault(address.place, rank)
        deadline, number = time.monotonic() + timeout, next(_copies)
        copies = [self._copy(self.links[rank], number, memory, size, deadline) for rank in firsts.values()]
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(copy) for copy in copies]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        paths = dict(zip(firsts, (copy.result() for copy in running), strict=True))
        return [(paths[address.place], number) for address in self.addresses]

    async def _copy(self, link: _Link, number: int, memory: SharedMemory, size: int, deadline: float) -> str:
        """Copy memory to a worker, a few parts at a time; return the path there."""
        under_way: list[WorkerCall] = []
        op, path = f"store at {link.name}", ""
        for start in range(0, size, MAX_PAYLOAD_BYTES):
            part = memory.read(start, min(MAX_PAYLOAD_BYTES, size - start))
            reply = link.send("store", {"number": number, "start": start}, part)
            under_way.append(WorkerCall(op, [reply]))
            if len(under_way) == _PARTS:
                await under_way.pop(0).results(max(deadline - time.monotonic(), 0.0))
        for call in under_way:
            (result,) = await call.results(max(deadline - time.monotonic(), 0.0))
            path = result["path"]
        return path

    async def call(self, op: str, timeout: float, **arguments: Any) -> list[dict[str, Any]]:
        """Run an operation on all workers and return their results; raises as `WorkerCall.results`."""
        return await self.begin(op, **arguments).results(timeout)


@dataclass(frozen=True)
class WorkerCall:
    """An operation under way on several workers."""

    op: str
    replies: list[Reply]

    async def acknowledged(self, timeout: float) -> None:
        """Wait until every worker has acknowledged, or sent a result already; raises as `results`."""
        await self._all([reply.acknowledged for reply in self.replies], timeout)
        await self._all([reply.result for reply in self.replies if reply.result.done()], timeout)

    async def results(self, timeout: float) -> list[dict[str, Any]]:
        """Return the results of all workers, in their order.

        Raises the first refusal, or `install_failed` if a worker sends no result within `timeout` seconds.
        """
        return await self._all([reply.result for reply in self.replies], timeout)

    @property
    def done(self) -> bool:
        """Whether the operation has ended on all workers, successful or not."""
        return all(reply.result.done() for reply in self.replies)

    async def ended(self) -> None:
        """Wait until the operation has ended on all workers, successful or not."""
        await asyncio.gather(*(asyncio.shield(reply.result) for reply in self.replies), return_exceptions=True)

    async def _all(self, futures: list[asyncio.Future[Any]], timeout: float) -> list[Any]:
        try:
            async with asyncio.timeout(timeout):
                results = [await asyncio.shield(future) for future in futures]
        except TimeoutError:
            late = sum(not future.done() for future in futures)
            raise InstallFailed(
                f"{late} of {len(futures)} workers did not answer {self.op} within {timeout:.1f} s"
            ) from None
        for result in results:
            if result is not None and not result["ok"]:
                raise error_class(ErrorCode(result["code"]))(result["message"])
        return results


class Reply:
    """Futures of a worker's acknowledgement and result."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.acknowledged: asyncio.Future[None] = loop.create_future()
        self.result: asyncio.Future[dict[str, Any]] = loop.create_future()
        # No task may be waiting when a link breaks: retrieve the exception.
        for future in (self.acknowledged, self.result):
            future.add_done_callback(lambda f: f.cancelled() or f.exception())

    def fail(self, reason: str) -> None:
        """End both futures: the worker cannot be reached any more."""
        for future in (self.acknowledged, self.result):
            if not future.done():
                future.set_exception(EngineDead(reason))


async def _open(address: WorkerAddress, secret: bytes, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a link to a worker, which may have to turn away others first; raises `engine_dead`."""
    deadline, reason = time.monotonic() + _CONNECT_S, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                try:
                    reader, writer = await asyncio.open_connection(address.host, address.port, limit=MAX_ANSWER_BYTES)
                    try:
                        await tcp.introduce(reader, writer, secret)
                        tcp.end_when_silent(writer.get_extra_info("socket"))
                        return reader, writer
                    except BaseException:
                        writer.close()
                        raise
                except (OSError, EOFError) as error:
                    reason = str(error)
        await asyncio.sleep(_RETRY_S)
    raise EngineDead(
        f"{name} cannot be reached from the server's host ({reason}): hosts of one engine must reach each other at the "
        "addresses that they listen at ($VLLM_HOST_IP; on a Ray cluster those of its nodes), on all ports"
    )


class _Link:
    """The link to one worker. It ends once, whatever the reason, and everybody who waits is told."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_break: Callable[[EngineDead], None],
        name: str,
    ) -> None:
        self._writer, self._on_break, self.name = writer, on_break, name
        self._ids = itertools.count()
        self._replies: dict[int, Reply] = {}
        self._broken = ""  # why, once it is
        self._lost = ""  # what the network says of it
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))
        self._reading.add_done_callback(self._end)

    def send(self, op: str, arguments: dict[str, Any], payload: bytes = b"") -> Reply:
        """Send a request, with at most `MAX_PAYLOAD_BYTES` after it."""
        reply = Reply()
        if self._broken:
            reply.fail(self._broken)
            return reply
        request_id = next(self._ids)
        arguments = {**arguments, "payload": len(payload)} if payload else arguments
        line = json.dumps({"id": request_id, "op": op, **arguments}).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise TooLarge(
                f"{op}: {len(line)} bytes are more than a worker takes in a request ({MAX_REQUEST_BYTES}); "
                "push an adapter of fewer tensors with shorter names"
            )
        self._replies[request_id] = reply
        self._writer.write(line)
        if payload:
            self._writer.write(payload)
        return reply

    def close(self) -> None:
        self._reading.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except OSError as error:
            self._lost = f" ({error.strerror or error})"

    def _end(self, reading: asyncio.Task[None]) -> None:
        self._broken = f"{self.name} has ended{self._lost}"
        if not reading.cancelled() and (error := reading.exception()) is not None:
            self._broken = f"cannot read the answers of {self.name}: {type(error).__name__}: {error}"
        self._writer.close()
        for reply in self._replies.values():
            reply.fail(self._broken)
        if not reading.cancelled():
            self._on_break(EngineDead(self._broken))

    def _take(self, message: dict[str, Any]) -> None:
        result = message.get("result")
        reply = self._replies[message["id"]] if result is None else self._replies.pop(message["id"])
        if not reply.acknowledged.done():
            reply.acknowledged.set_result(None)
        if result is not None:
            reply.result.set_result(result)
