"""Links over TCP: who does not know the engine's secret gets nowhere; adapters arrive, once on every host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from rollout_server.ipc import client, tcp
from rollout_server.ipc.client import WorkerAddress, Workers
from rollout_server.ipc.lines import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES
from rollout_server.ipc.memory import SharedMemory, place
from rollout_server.ipc.server import serve_over_tcp
from rollout_server.worker.extension import Operations
from shared.errors import EngineDead, ErrorCode, LockstepError

HOST = "127.0.0.1"
SECRET = os.urandom(tcp.SECRET_BYTES)


class _Worker:
    """A worker's end, with the operation `store` of real ones, and some of this test."""

    def __init__(self, place: str = "here") -> None:
        self.ended = threading.Event()
        self.touched = threading.Event()
        self.operations = Operations(SimpleNamespace(device=torch.device("cpu")), SimpleNamespace())
        served: dict[str, Any] = {
            "store": self.operations.store,
            "echo": lambda _, text: {"text": text},
            "touch": lambda _: self.touched.set(),
            "wait": lambda _, **arguments: time.sleep(60),
        }
        self.address = WorkerAddress(HOST, serve_over_tcp(HOST, SECRET, served, self.ended.set), place)

    def stored(self) -> bytes:
        assert self.operations.stored
        memory = self.operations.stored[1]
        return Path(memory.path).read_bytes()


@contextlib.asynccontextmanager
async def _linked(*workers: _Worker) -> AsyncIterator[tuple[Workers, list[EngineDead]]]:
    broken: list[EngineDead] = []
    linked = await Workers.connect_over_tcp([worker.address for worker in workers], SECRET, broken.append)
    try:
        yield linked, broken
    finally:
        linked.close()


def _stranger(worker: _Worker) -> socket.socket:
    return socket.create_connection(worker.address[:2], timeout=5.0)


async def test_calls_go_over_tcp() -> None:
    first, second = _Worker(), _Worker()
    async with _linked(first, second) as (workers, broken):
        text = "a" * (MAX_ANSWER_BYTES - 200)
        assert [answer["text"] for answer in await workers.call("echo", 5.0, text=text)] == [text, text]
        assert not broken


@pytest.mark.parametrize(
    "sent",
    [os.urandom(64), b'{"id": 0, "op": "touch"}\n' * 5, b"GET / HTTP/1.1\r\n\r\n" * 5],
    ids=["wrong proof", "request", "HTTP"],
)
async def test_a_stranger_is_refused_and_the_server_is_not(sent: bytes) -> None:
    worker = _Worker()
    with _stranger(worker) as stranger:
        assert len(await asyncio.to_thread(stranger.recv, 1000)) == 32  # a nonce, and nothing else
        stranger.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.to_thread(stranger.recv, 1000) == b""
    async with _linked(worker) as (workers, _):
        await workers.call("echo", 5.0, text="the server")
    assert not worker.touched.is_set()


async def test_a_stranger_cannot_use_what_the_server_proved_elsewhere() -> None:
    """A proof holds for one nonce of one worker."""
    first, second = _Worker(), _Worker()
    with _stranger(first) as one, _stranger(second) as other:
        nonce = await asyncio.to_thread(one.recv, 32)
        assert nonce != await asyncio.to_thread(other.recv, 32)
        ours = os.urandom(32)
        proven = ours + tcp._proof(SECRET, b"server", nonce + ours)
        other.sendall(proven)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.to_thread(other.recv, 1000) == b""
        one.sendall(proven)
        assert await asyncio.to_thread(one.recv, 1000) == tcp._proof(SECRET, b"worker", nonce + ours)


async def test_silent_strangers_keep_the_server_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "HANDSHAKE_S", 3.0)
    worker = _Worker()
    with contextlib.ExitStack() as opened:
        silent, slow, *_ = [opened.enter_context(_stranger(worker)) for _ in range(12)]
        slow.sendall(b"a")
        started = time.monotonic()
        async with _linked(worker) as (workers, _):
            await workers.call("echo", 5.0, text="the server")
        assert time.monotonic() - started < 2.5
        with contextlib.suppress(ConnectionResetError):
            assert len(await asyncio.to_thread(silent.recv, 1000)) == 32
            assert await asyncio.to_thread(silent.recv, 1000) == b""


async def test_an_impostor_gets_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CONNECT_S", 1.0)
    heard = b""

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        writer.write(os.urandom(32))
        await reader.readexactly(64)
        writer.write(os.urandom(32))
        heard += await reader.read()
        writer.close()

    async with await asyncio.start_server(impostor, HOST, 0) as server:
        address = WorkerAddress(HOST, server.sockets[0].getsockname()[1], "here")
        with pytest.raises(EngineDead, match=r"worker 0 of the engine.*does not know this engine's secret"):
            await Workers.connect_over_tcp([address], SECRET, lambda reason: None)
    assert heard == b""


async def test_nobody_can_connect_after_the_server() -> None:
    worker = _Worker()
    async with _linked(worker) as (workers, _):
        await workers.call("echo", 5.0, text="the server")
        with pytest.raises(ConnectionRefusedError):
            _stranger(worker)


async def test_a_worker_that_is_not_there_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CONNECT_S", 1.0)
    worker = _Worker()
    async with _linked(worker):
        with pytest.raises(EngineDead, match=rf"worker 1 of the engine \({HOST}:1\) cannot be reached"):
            await Workers.connect_over_tcp([_Worker().address, WorkerAddress(HOST, 1, "here")], SECRET, lambda _: None)


async def test_a_worker_ends_with_its_server() -> None:
    worker = _Worker()
    async with _linked(worker) as (workers, broken):
        await workers.call("echo", 5.0, text="the server")
        assert not worker.ended.is_set()
    assert await asyncio.to_thread(worker.ended.wait, 5.0)
    assert not broken


async def test_the_reason_names_the_worker_and_its_host() -> None:
    async def worker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = os.urandom(32)
        writer.write(nonce)
        answer = await reader.readexactly(64)
        writer.write(tcp._proof(SECRET, b"worker", nonce + answer[:32]))
        await reader.readline()
        writer.transport.abort()

    broken: list[EngineDead] = []
    async with await asyncio.start_server(worker, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        workers = await Workers.connect_over_tcp([WorkerAddress(HOST, port, "here")], SECRET, broken.append)
        with pytest.raises(LockstepError, match=rf"worker 0 of the engine \({HOST}:{port}\) has ended") as failure:
            await workers.call("describe", 5.0)
    assert failure.value.code is ErrorCode.ENGINE_DEAD
    assert len(broken) == 1


@pytest.mark.parametrize("size", [1, MAX_PAYLOAD_BYTES, 3 * MAX_PAYLOAD_BYTES + 17, 9 * MAX_PAYLOAD_BYTES])
async def test_an_adapter_goes_once_to_each_place(size: int) -> None:
    one, beside, elsewhere = _Worker("one host"), _Worker("one host"), _Worker("another")
    async with _linked(one, beside, elsewhere) as (workers, _):
        memory = SharedMemory.make()
        paths = []
        for seed in range(2):  # the second into the memory of the first
            data = bytes([seed + 1]) * size
            memory.write(data, 0)
            paths.append([path for path, _ in await workers.readable(memory, size, 10.0)])
            assert one.stored() == elsewhere.stored() == data
        first, same, other = paths[0]
        assert first == same != other
        assert paths[1] == paths[0]
        assert beside.operations.stored is None
        memory.free()
        another = SharedMemory.make()
        another.write(b"shorter", 0)
        await workers.readable(another, 7, 10.0)
        assert one.stored().startswith(b"shorter")


async def test_workers_of_this_host_read_the_memory_itself(tmp_path: Path) -> None:
    memory = SharedMemory.make()
    workers = Workers([None, None])  # type: ignore[list-item]
    assert await workers.readable(memory, 10, 1.0) == [(memory.path, memory.number)] * 2


async def test_what_is_read_is_the_last_copy() -> None:
    """A copy of other memory between two of the same one, and a part of it that comes late."""
    worker, memories = _Worker(), [SharedMemory.make(), SharedMemory.make()]
    read = []
    async with _linked(worker) as (workers, _):
        for turn, memory in enumerate((memories[0], memories[1], memories[0])):
            memory.write(bytes([turn + 1]) * 8, 0)
            [(path, number)] = await workers.readable(memory, 8, 10.0)
            read.append(bytes(worker.operations._mapped(path, number, 2, 6).tolist()))
        late = workers.links[0].send("store", {"number": number - 1, "start": 0}, b"late")
        assert not (await late.result)["ok"]
        assert worker.stored() == bytes([3]) * 8
    assert read == [bytes([turn]) * 4 for turn in (1, 2, 3)]


async def test_both_ends_notice_a_host_that_falls_silent() -> None:
    found = []
    worker = _Worker()
    async with _linked(worker) as (workers, _):
        ours = workers.links[0]._writer.get_extra_info("socket")
        theirs = [link for link in psutil.Process().net_connections("tcp") if link.laddr == ours.getpeername()[:2]]
        ends = [ours, *(socket.fromfd(link.fd, socket.AF_INET, socket.SOCK_STREAM) for link in theirs if link.raddr)]
        for end in ends:
            alive = end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            found.append((alive, end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)))
        for end in ends[1:]:
            end.close()
    assert found == [(1, 60_000)] * 2


async def test_a_copy_that_does_not_arrive_is_a_push_that_failed() -> None:
    worker = _Worker()
    worker.operations.storing.acquire()
    async with _linked(worker) as (workers, broken):
        memory = SharedMemory.make()
        memory.write(b"a" * 100, 0)
        with pytest.raises(LockstepError, match=r"did not answer store at worker 0 of the engine") as failure:
            await workers.readable(memory, 100, 0.3)
        assert failure.value.code is ErrorCode.INSTALL_FAILED
        worker.operations.storing.release()
        await workers.readable(memory, 100, 5.0)
        assert not broken


async def test_more_than_a_part_ends_the_link() -> None:
    worker = _Worker()
    async with _linked(worker) as (workers, broken):
        (link,) = workers.links
        reply = link.send("store", {"number": 1, "start": 0}, b"a" * (MAX_PAYLOAD_BYTES + 1))
        with pytest.raises(EngineDead):
            await asyncio.wait_for(reply.result, 5.0)
        assert len(broken) == 1


def test_a_place_is_this_machine() -> None:
    assert place() == place()
    assert len(place()) > 36
