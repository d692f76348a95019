"""The links to the workers: whatever a worker answers, the server knows what became of it, or that the link is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rollout_server.ipc import lines
from rollout_server.ipc.client import Workers
from rollout_server.ipc.server import serve
from shared.errors import EngineDead, ErrorCode, LockstepError, UnsupportedAdapter


def _refuse(_: Any, text: str) -> None:
    raise UnsupportedAdapter(f"no layer {text}")


def _exit(_: Any) -> None:
    raise SystemExit(1)


def _blow_up(_: Any) -> None:
    raise RuntimeError("\udc80" * 100_000)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "echo": lambda _, text: {"text": text},
    "refuse": _refuse,
    "exit": _exit,
    "blow_up": _blow_up,
    "unserialisable": lambda _: {"an object": object()},
}


@contextlib.asynccontextmanager
async def _linked(folder: Path) -> AsyncIterator[tuple[Workers, list[EngineDead]]]:
    broken: list[EngineDead] = []
    serve(folder, _OPERATIONS)
    workers = await Workers.connect(list(folder.glob("*.sock")), 1, broken.append)
    try:
        yield workers, broken
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("op", "arguments", "code"),
    [
        ("refuse", {"text": "a" * 70_000}, ErrorCode.UNSUPPORTED_ADAPTER),
        ("refuse", {"text": "\N{GRINNING FACE}" * 70_000}, ErrorCode.UNSUPPORTED_ADAPTER),
        ("echo", {"text": "a" * (lines.MAX_ANSWER_BYTES + 1)}, ErrorCode.INSTALL_FAILED),
        ("echo", {"unknown": 1}, ErrorCode.INSTALL_FAILED),
        ("exit", {}, ErrorCode.INSTALL_FAILED),
        ("blow_up", {}, ErrorCode.INSTALL_FAILED),
        ("unserialisable", {}, ErrorCode.INSTALL_FAILED),
        ("no such operation", {}, ErrorCode.INSTALL_FAILED),
    ],
)
async def test_whatever_an_operation_does_is_an_answer(
    tmp_path: Path, op: str, arguments: dict[str, Any], code: ErrorCode
) -> None:
    async with _linked(tmp_path) as (workers, broken):
        with pytest.raises(LockstepError) as refusal:
            await workers.call(op, 5.0, **arguments)
        assert refusal.value.code is code
        (answer,) = await workers.call("echo", 5.0, text="the next call")
        assert answer["text"] == "the next call"
        assert not broken


@pytest.mark.parametrize("length", [70_000, lines.MAX_ANSWER_BYTES - 200])
async def test_long_answers_arrive(tmp_path: Path, length: int) -> None:
    async with _linked(tmp_path) as (workers, _):
        (answer,) = await workers.call("echo", 5.0, text="a" * length)
        assert len(answer["text"]) == length


async def test_a_request_that_no_worker_takes_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.ipc.client.MAX_REQUEST_BYTES", 1000)
    async with _linked(tmp_path) as (workers, broken):
        with pytest.raises(LockstepError) as refusal:
            await workers.call("echo", 5.0, text="a" * 1000)
        assert refusal.value.code is ErrorCode.TOO_LARGE
        await workers.call("echo", 5.0, text="a")
        assert not broken


async def test_a_worker_that_cannot_read_a_request_ends_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.ipc.server.MAX_REQUEST_BYTES", 1000)
    async with _linked(tmp_path) as (workers, broken):
        with pytest.raises(LockstepError) as failure:
            await workers.call("echo", 5.0, text="a" * 1000)
        assert failure.value.code is ErrorCode.ENGINE_DEAD
        assert len(broken) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{\n",
        b"[]\n",
        b"5\n",
        b'{"id": 7, "result": {"ok": true}}\n',
        b'{"result": {"ok": true}}\n',
        b"a" * (lines.MAX_ANSWER_BYTES + 2) + b"\n",
        b'{"id": 0, "result"',
    ],
)
async def test_an_answer_that_makes_no_sense_ends_the_link_and_everybody_knows(tmp_path: Path, answer: bytes) -> None:
    broken: list[EngineDead] = []

    async def worker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert json.loads(await reader.readline())["op"] == "check"
        writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(worker, tmp_path / "worker.sock")
    async with server:
        workers = await Workers.connect([tmp_path / "worker.sock"], 1, broken.append)
        for _ in range(2):
            with pytest.raises(LockstepError) as failure:
                await workers.call("check", 5.0)
            assert failure.value.code is ErrorCode.ENGINE_DEAD
        assert len(broken) == 1


async def test_a_server_that_leaves_breaks_nothing(tmp_path: Path) -> None:
    async with _linked(tmp_path) as (workers, broken):
        workers.close()
        await asyncio.sleep(0.05)
        assert not broken
        with pytest.raises(LockstepError) as failure:
            await workers.call("echo", 5.0, text="a")
        assert failure.value.code is ErrorCode.ENGINE_DEAD
