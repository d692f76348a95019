"""The server's end of the sockets to vLLM's workers: every call goes to all of them, every result is counted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_server.ipc.lines import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES
from shared.errors import EngineDead, ErrorCode, InstallFailed, InvalidRequest, TooLarge, error_class


@dataclass(frozen=True)
class Workers:
    """All workers of all engines of this server."""

    links: list[_Link]

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
        limit = MAX_ANSWER_BYTES
        return cls([_Link(*await asyncio.open_unix_connection(str(path), limit=limit), on_break) for path in paths])

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


class _Link:
    """The socket to one worker. It ends once, whatever the reason, and everybody who waits is told."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_break: Callable[[EngineDead], None]
    ) -> None:
        self._writer, self._on_break = writer, on_break
        self._ids = itertools.count()
        self._replies: dict[int, Reply] = {}
        self._broken = ""  # why, once it is
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))
        self._reading.add_done_callback(self._end)

    def send(self, op: str, arguments: dict[str, Any]) -> Reply:
        reply = Reply()
        if self._broken:
            reply.fail(self._broken)
            return reply
        request_id = next(self._ids)
        line = json.dumps({"id": request_id, "op": op, **arguments}).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise TooLarge(
                f"{op}: {len(line)} bytes are more than a worker takes in a request ({MAX_REQUEST_BYTES}); "
                "push an adapter of fewer tensors with shorter names"
            )
        self._replies[request_id] = reply
        self._writer.write(line)
        return reply

    def close(self) -> None:
        self._reading.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self._take(json.loads(line))

    def _end(self, reading: asyncio.Task[None]) -> None:
        self._broken = "a worker of the engine has ended"
        if not reading.cancelled() and (error := reading.exception()) is not None:
            self._broken = f"cannot read a worker's answers: {type(error).__name__}: {error}"
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
