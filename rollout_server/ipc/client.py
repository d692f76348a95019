"""The server's end of the sockets to vLLM's workers: every call goes to all of them, every answer is counted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

from shared.errors import EngineDead, ErrorCode, InstallFailed, InvalidRequest, LockstepError, error_class

Answer = dict[str, Any]


class Workers:
    """All workers of all engines of this server."""

    def __init__(self, links: list[_Link]) -> None:
        self._links = links

    @classmethod
    async def connect(cls, paths: list[Path], count: int) -> Workers:
        """Connect to the sockets that workers listen on.

        Raises:
            LockstepError: `invalid_request` if they are not `count`: some run where this server cannot reach them.
        """
        if len(paths) != count:
            raise InvalidRequest(
                f"{len(paths)} of the engine's {count} workers run on this host; a rollout server reaches only those: "
                "choose a layout that fits on one host, or start several rollout servers"
            )
        return cls([_Link(*await asyncio.open_unix_connection(str(path))) for path in paths])

    def __len__(self) -> int:
        return len(self._links)

    def begin(self, op: str, **arguments: Any) -> Call:
        """Ask all workers for an operation of `worker._Operations`."""
        return Call(op, [link.send(op, arguments) for link in self._links])

    async def call(self, op: str, timeout: float, **arguments: Any) -> list[Answer]:
        """Ask all workers, and wait for what they answer.

        Raises:
            LockstepError: what the first one that refused says; `install_failed` if one does not answer in time.
        """
        return await self.begin(op, **arguments).answers(timeout)

    def begin_each(self, op: str, arguments: list[dict[str, Any]]) -> Call:
        """Ask each worker with arguments of its own, from the first on."""
        return Call(op, [link.send(op, own) for link, own in zip(self._links, arguments, strict=False)])

    async def close(self) -> None:
        """Close all sockets."""
        for link in self._links:
            await link.close()


class Call:
    """One operation under way on several workers."""

    def __init__(self, op: str, pending: list[_Pending]) -> None:
        self._op = op
        self._pending = pending

    async def told(self, timeout: float) -> None:
        """Wait until every worker has told its first event, or has answered already.

        Raises:
            LockstepError: `install_failed` after `timeout` seconds; what a worker answers in its stead.
        """
        await self._all([pending.told for pending in self._pending], timeout)
        _raise_first([p.answer.result() for p in self._pending if p.answer.done()])

    async def answers(self, timeout: float) -> list[Answer]:
        """The answers of all workers, in their order.

        Raises:
            LockstepError: as in `Workers.call`.
        """
        answers = await self._all([pending.answer for pending in self._pending], timeout)
        _raise_first(answers)
        return answers

    async def ended(self) -> None:
        """Wait until no worker is at it any more, whatever came of it."""
        await asyncio.gather(*(asyncio.shield(pending.answer) for pending in self._pending), return_exceptions=True)

    async def _all(self, futures: list[asyncio.Future[Any]], timeout: float) -> list[Any]:
        try:
            async with asyncio.timeout(timeout):
                return [await asyncio.shield(future) for future in futures]
        except TimeoutError:
            late = sum(not future.done() for future in futures)
            raise InstallFailed(
                f"{late} of {len(futures)} workers did not answer {self._op} within {timeout:.1f} s"
            ) from None


class _Pending:
    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.told: asyncio.Future[None] = loop.create_future()
        self.answer: asyncio.Future[Answer] = loop.create_future()
        # Nobody may be waiting any more when a link breaks.
        for future in (self.told, self.answer):
            future.add_done_callback(lambda f: f.cancelled() or f.exception())

    def event(self) -> None:
        if not self.told.done():
            self.told.set_result(None)

    def resolve(self, answer: Answer) -> None:
        self.event()
        self.answer.set_result(answer)

    def fail(self, error: LockstepError) -> None:
        for future in (self.told, self.answer):
            if not future.done():
                future.set_exception(error)


class _Link:
    """The socket to one worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ids = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._broken = False
        self._reading = asyncio.get_running_loop().create_task(self._read())

    def send(self, op: str, arguments: dict[str, Any]) -> _Pending:
        pending = _Pending()
        if self._broken:
            pending.fail(_gone())
            return pending
        call = next(self._ids)
        self._pending[call] = pending
        self._writer.write(json.dumps({"id": call, "op": op, **arguments}).encode() + b"\n")
        return pending

    async def close(self) -> None:
        self._writer.close()
        self._reading.cancel()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._pending[message["id"]].event()
                else:
                    self._pending.pop(message["id"]).resolve(message["answer"])
        except OSError:
            pass
        finally:
            self._broken = True
            for pending in self._pending.values():
                pending.fail(_gone())


def _gone() -> LockstepError:
    return EngineDead("a worker of the engine has ended")


def _raise_first(answers: list[Answer]) -> None:
    """Raise what the first worker that refused says."""
    for answer in answers:
        if not answer["ok"]:
            raise error_class(ErrorCode(answer["code"]))(answer["message"])
