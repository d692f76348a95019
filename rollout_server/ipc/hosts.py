"""Hosts of one engine (`--nnodes`) meet before any of them loads the model, and notice when another one ends.

The head listens at --master-addr and --master-port, where torch.distributed is to listen afterwards, and the others
connect: both prove that they were given the same token. Each of the others says its rank and the terms that all must
have in common, and gets the head's word: it begins to load, or is refused. Then the connections stay open and silent:
a host that ends closes its own, after a line with the reason if it has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.ipc import tcp
from shared.errors import EngineDead, InvalidRequest

#: Of a line, bytes.
_LINE = 2**16
#: Connections that prove themselves at the same time.
_ADMITTING = 32
_RETRY_S, _SAY_S = 0.5, 30.0
#: For the port of an engine that has just ended.
_PORT_S = 60.0

logger = logging.getLogger("lockstep.hosts")


@dataclass(frozen=True)
class Meeting:
    """What a host knows of the engine before it meets the others.

    Attributes:
        address: where the head listens.
        terms: what all hosts must have in common, by the flag that sets it.
        timeout: seconds in which all must have come.
    """

    address: str
    port: int
    nodes: int
    secret: bytes
    terms: Mapping[str, str]
    timeout: float

    @property
    def head(self) -> str:
        return f"{self.address}:{self.port}"


class Head:
    """The head's end: the other hosts, each with a connection of its own.

    Attributes:
        on_end: called with the reason when one of them has ended; at most once.
        lost: that reason.
    """

    def __init__(self, meeting: Meeting, on_end: Callable[[EngineDead], None]) -> None:
        self.on_end, self.lost = on_end, asyncio.get_running_loop().create_future()
        self._meeting = meeting
        self._present: dict[int, _Host] = {}
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._started = self._closed = False
        self._admitting = asyncio.Semaphore(_ADMITTING)
        self._strangers: set[str] = set()  # of which it was said
        self._tasks: set[asyncio.Task[None]] = set()

    async def meet(self) -> None:
        """Wait for all other hosts, and let them begin.

        Raises:
            InvalidRequest: the port cannot be used, or a host was given other flags.
            EngineDead: not all have come in time.
        """
        meeting = self._meeting
        server = await self._listening()
        logger.info("waiting at %s for the other hosts: %s", meeting.head, self._missing())
        deadline, said = time.monotonic() + meeting.timeout, time.monotonic()
        try:
            while len(self._present) < meeting.nodes - 1 and not self._refused.done():
                if time.monotonic() > deadline:
                    raise EngineDead(
                        f"{self._missing()} did not come to {meeting.head} within {meeting.timeout:.0f} s "
                        "(--distributed-timeout-seconds)"
                    )
                if time.monotonic() > said + _SAY_S:
                    said = time.monotonic()
                    logger.info("still waiting at %s for the other hosts: %s", meeting.head, self._missing())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _RETRY_S)
                self._changed.clear()
        except BaseException:
            self.close()
            raise
        finally:
            server.close()  # its port is torch's now; connections stay
        refused = self._refused.result() if self._refused.done() else ""
        self._started = True
        for host in self._present.values():
            host.say(refused=refused)
        if refused:
            self.close()
            raise InvalidRequest(refused)
        logger.info("all hosts of the engine have come: %s", ", ".join(map(str, self._present.values())))

    async def _listening(self) -> asyncio.Server:
        address, port = self._meeting.address, self._meeting.port
        deadline = time.monotonic() + _PORT_S
        while True:
            try:
                return await asyncio.start_server(self._admit, address, port, limit=_LINE, reuse_address=True)
            except OSError as error:
                # That of an engine that has been killed is free once its workers have ended.
                if time.monotonic() > deadline or "in use" not in str(error):
                    raise InvalidRequest(
                        f"--master-addr {address} --master-port {port}: the head cannot listen there "
                        f"({error.strerror or error}); give an address of this host, and a free port"
                    ) from error
            await asyncio.sleep(_RETRY_S)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            if self._admitting.locked():  # the host tries again
                return
            async with self._admitting:
                host = await self._introduced(reader, writer)
            if host is not None:
                await self._stay(host, reader)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            pass  # no host of this engine, or one that will try again
        except asyncio.CancelledError:
            pass  # by `close`: asyncio would log it
        finally:
            writer.close()

    async def _introduced(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Host | None:
        """Return the host at the other end, if it may take part."""
        if not await tcp.admit_stream(reader, writer, self._meeting.secret):
            if (stranger := writer.get_extra_info("peername")[0]) not in self._strangers:  # they try again and again
                self._strangers.add(stranger)
                logger.warning("connections from %s are refused: it has another token than this host", stranger)
            return None
        async with asyncio.timeout(tcp.HANDSHAKE_S):
            hello = json.loads(await reader.readline())
        host, terms = _Host(int(hello["rank"]), str(hello["address"]), str(hello["workers"]), writer), hello["terms"]
        if not isinstance(terms, dict):
            return None
        tcp.end_when_silent(writer.get_extra_info("socket"))
        if self._started or self._refused.done():
            return None
        problem = _difference(self._meeting.terms, terms, str(host))
        if not problem and not 0 < host.rank < self._meeting.nodes:
            problem = f"{host.address} has --node-rank {host.rank} of --nnodes {self._meeting.nodes}"
        if (other := self._present.get(host.rank)) is not None:
            problem = f"two hosts have --node-rank {host.rank}: {other.address} and {host.address}"
        if problem:
            host.say(refused=problem)
            self._refused.set_result(problem)
            self._changed.set()
            return None
        self._present[host.rank] = host
        logger.info("%s has come", host)
        self._changed.set()
        return host

    async def _stay(self, host: _Host, reader: asyncio.StreamReader) -> None:
        """Return when a host has ended."""
        line = b""
        with contextlib.suppress(OSError, ValueError):
            line = await reader.readline()
        if self._closed:
            return
        if not self._started:
            del self._present[host.rank]
            logger.info("%s has left again", host)
            return
        reason = _reason(line)
        if not self.lost.done():
            error = EngineDead(f"{host} has ended{reason and ': ' + reason}")
            self.lost.set_result(error)
            self.on_end(error)

    async def reason(self, seconds: float) -> str | None:
        """Return why a host has ended, if one has or does so within `seconds`."""
        with contextlib.suppress(TimeoutError):
            return str((await asyncio.wait_for(asyncio.shield(self.lost), seconds)).message)
        return None

    def close(self) -> None:
        """End the engine on all other hosts."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _missing(self) -> str:
        ranks = [rank for rank in range(1, self._meeting.nodes) if rank not in self._present]
        return f"--node-rank {', '.join(map(str, ranks))} of --nnodes {self._meeting.nodes}"


@dataclass(frozen=True)
class _Host:
    rank: int
    address: str
    workers: str
    writer: asyncio.StreamWriter

    def __str__(self) -> str:
        return f"host {self.rank} of the engine ({self.address}, {self.workers})"

    def say(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


class Follower:
    """The other end: the connection of a host to the head."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def join(cls, meeting: Meeting, rank: int, address: str, workers: str) -> Follower:
        """Connect to the head, and return once all hosts have come.

        Args:
            address: of this host.
            workers: which ones run here.

        Raises:
            InvalidRequest: the head has refused this host, or another one, and why.
            EngineDead: it has not come in time, or has ended.
        """
        deadline, said = time.monotonic() + meeting.timeout, ""
        while (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    reader, writer = await asyncio.open_connection(meeting.address, meeting.port, limit=_LINE)
                    try:
                        async with asyncio.timeout(tcp.HANDSHAKE_S):
                            await tcp.introduce(reader, writer, meeting.secret)
                        tcp.end_when_silent(writer.get_extra_info("socket"))
                        hello = {"rank": rank, "address": address, "workers": workers, "terms": meeting.terms}
                        writer.write(json.dumps(hello).encode() + b"\n")
                        logger.info("the head (%s) is there; waiting until all hosts are", meeting.head)
                        said = ""
                        if not (line := await reader.readline()):
                            raise ConnectionError("the head has ended, or has no room for this host yet")
                    except BaseException:
                        writer.close()
                        raise
            except (OSError, EOFError) as error:  # TimeoutError is an OSError
                if time.monotonic() >= deadline:
                    break
                problem = _why(error)
                if problem != said:
                    logger.info("the head (%s) is not there yet: %s", meeting.head, problem)
                    said = problem
                await asyncio.sleep(min(_RETRY_S, max(deadline - time.monotonic(), 0.0)))
                continue
            if refused := json.loads(line).get("refused"):
                writer.close()
                raise InvalidRequest(f"the head ({meeting.head}) has refused: {refused}")
            return cls(reader, writer)
        raise EngineDead(
            f"the head ({meeting.head}) and all other hosts did not come within {meeting.timeout:.0f} s "
            f"(--distributed-timeout-seconds){said and ': ' + said}"
        )

    async def ended(self) -> None:
        """Return when the head has ended."""
        with contextlib.suppress(OSError, ValueError):
            await self._reader.read()

    async def leave(self, reason: str) -> None:
        """End the engine, and say why."""
        with contextlib.suppress(OSError):
            self._writer.write(json.dumps({"ended": reason}).encode()[: _LINE - 1] + b"\n")
            async with asyncio.timeout(_RETRY_S):
                await self._writer.drain()
        self._writer.close()


def _difference(ours: Mapping[str, str], theirs: Mapping[str, str], host: str) -> str:
    """Return which terms of another host differ from the head's, if any do."""
    different = [name for name in ours if theirs.get(name) != ours[name]]
    told = [f"{name} ({str(theirs.get(name))[:200]}; {ours[name][:200]} on the head)" for name in different]
    return f"{host} differs from the head in {', '.join(told)}: give all hosts the same flags" if told else ""


def _reason(line: bytes) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(line).get("ended", ""))
    return ""


def _why(error: Exception) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "it closed the connection, as it does where this host has another token; or it is no head of an engine"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
