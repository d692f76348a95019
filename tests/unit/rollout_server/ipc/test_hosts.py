"""Hosts of one engine meet, compare what must be the same, and notice when another one ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator

import pytest

from learner.utils.ports import free_port
from rollout_server.ipc import hosts, tcp
from rollout_server.ipc.hosts import Follower, Head, Meeting
from shared.errors import EngineDead, InvalidRequest

HOST = "127.0.0.1"
TERMS = {"--apply": "adapter", "--max-lora-rank": "16"}


def _meeting(nodes: int = 2, timeout: float = 10.0, **changed: object) -> Meeting:
    plain = {"address": HOST, "port": free_port(), "secret": os.urandom(tcp.SECRET_BYTES), "terms": TERMS}
    return Meeting(**{**plain, "nodes": nodes, "timeout": timeout, **changed})  # type: ignore[arg-type]


def _like(meeting: Meeting, **changed: object) -> Meeting:
    return Meeting(**{**vars(meeting), **changed})  # type: ignore[arg-type]


async def _join(meeting: Meeting, rank: int = 1) -> Follower:
    return await Follower.join(meeting, rank, f"10.0.0.{rank}", f"worker {rank}")


@contextlib.asynccontextmanager
async def _met(meeting: Meeting) -> AsyncIterator[tuple[Head, list[Follower], list[EngineDead]]]:
    lost: list[EngineDead] = []
    head = Head(meeting, lost.append)
    _, *followers = await asyncio.gather(head.meet(), *(_join(meeting, rank) for rank in range(1, meeting.nodes)))
    try:
        yield head, followers, lost
    finally:
        head.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_RETRY_S", 0.05)


async def test_all_hosts_begin_when_the_last_has_come() -> None:
    meeting = _meeting(nodes=3)
    early = asyncio.ensure_future(_join(meeting, 2))  # before the head
    await asyncio.sleep(0.2)
    head = Head(meeting, lambda reason: None)
    meet = asyncio.ensure_future(head.meet())
    await asyncio.sleep(0.2)
    assert not early.done()
    await asyncio.gather(meet, early, _join(meeting, 1))
    # Its port is torch's now, while the connections stay.
    with socket.create_server((HOST, meeting.port)):
        pass
    head.close()


async def test_a_host_that_leaves_before_may_come_again() -> None:
    meeting = _meeting(nodes=3)
    head = Head(meeting, lambda reason: pytest.fail(str(reason)))
    meet = asyncio.ensure_future(head.meet())
    first = asyncio.ensure_future(_join(meeting, 1))
    await asyncio.sleep(0.3)
    first.cancel()
    await asyncio.sleep(0.2)
    await asyncio.wait_for(asyncio.gather(meet, _join(meeting, 1), _join(meeting, 2)), 10.0)
    head.close()


async def test_the_reason_of_a_host_reaches_the_head() -> None:
    async with _met(_meeting(nodes=3)) as (head, followers, lost):
        assert await head.reason(0.01) is None
        await followers[1].leave("ValueError: no weight of that name")
        said = "host 2 of the engine (10.0.0.2, worker 2) has ended: ValueError: no weight of that name"
        assert await head.reason(5.0) == said
        await followers[0].leave("later")
        await asyncio.sleep(0.1)
        assert [reason.message for reason in lost] == [said]


async def test_a_host_that_is_cut_off_ends_the_engine() -> None:
    async with _met(_meeting()) as (head, followers, _):
        followers[0]._writer.transport.abort()
        assert await head.reason(5.0) == "host 1 of the engine (10.0.0.1, worker 1) has ended"


async def test_the_head_ends_the_others_and_hears_nothing_of_it() -> None:
    async with _met(_meeting()) as (head, followers, lost):
        ended = asyncio.ensure_future(followers[0].ended())
        await asyncio.sleep(0.1)
        assert not ended.done()
        head.close()
        await asyncio.wait_for(ended, 5.0)
        assert not lost


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"--apply": "merge", "--max-lora-rank": "16"}, r"in --apply \(merge; adapter on the head\): give all"),
        ({"--apply": "adapter"}, r"in --max-lora-rank \(None; 16 on the head\): give all"),
    ],
)
async def test_a_host_with_other_flags_is_refused_and_so_is_the_start(terms: dict[str, str], words: str) -> None:
    meeting = _meeting(nodes=3)
    right = asyncio.ensure_future(_join(meeting, 1))
    wrong = asyncio.ensure_future(_join(_like(meeting, terms=terms), 2))
    ends = await asyncio.gather(Head(meeting, lambda _: None).meet(), right, wrong, return_exceptions=True)
    for end in ends:
        assert isinstance(end, InvalidRequest)
        assert "host 2 of the engine (10.0.0.2, worker 2) differs from the head" in end.message
        with pytest.raises(InvalidRequest, match=words):
            raise end


async def test_two_hosts_of_one_rank_are_refused() -> None:
    meeting = _meeting(nodes=3)
    joins = [_join(meeting, 1), Follower.join(meeting, 1, "10.0.0.9", "worker 1")]
    ends = await asyncio.gather(Head(meeting, lambda _: None).meet(), *joins, return_exceptions=True)
    assert all("two hosts have --node-rank 1: " in str(end) for end in ends)


async def test_a_host_with_another_token_gets_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    meeting = _meeting(timeout=1.0)
    head = asyncio.ensure_future(Head(meeting, lambda _: None).meet())
    with pytest.raises(EngineDead, match="another token"):
        await _join(_like(meeting, secret=os.urandom(32), timeout=0.8))
    with pytest.raises(EngineDead, match=r"--node-rank 1 of --nnodes 2 did not come to .* within 1 s"):
        await head
    assert caplog.text.count(f"connections from {HOST} are refused: it has another token") == 1


async def test_a_stranger_keeps_nobody_waiting() -> None:
    meeting = _meeting()
    head = Head(meeting, lambda _: None)
    meet = asyncio.ensure_future(head.meet())
    await asyncio.sleep(0.1)
    silent, loud = (socket.create_connection((HOST, meeting.port)) for _ in range(2))
    with silent, loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n" * 5)
        await asyncio.wait_for(asyncio.gather(meet, _join(meeting)), 5.0)
    head.close()


async def test_a_host_whose_head_never_comes_ends() -> None:
    started = time.monotonic()
    with pytest.raises(EngineDead, match=r"did not come within 0 s \(--distributed-timeout-seconds\): "):
        await _join(_meeting(timeout=0.4))
    assert time.monotonic() - started < 3.0


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"--master-addr 192\.0\.2\.1 .*give an address of this host"):
        await Head(_meeting(address="192.0.2.1"), lambda _: None).meet()


@pytest.mark.parametrize("rank", [0, 2, -1])
async def test_a_rank_that_is_none_of_the_others_is_refused(rank: int) -> None:
    meeting = _meeting()
    ends = await asyncio.gather(Head(meeting, lambda _: None).meet(), _join(meeting, rank), return_exceptions=True)
    assert all(f"has --node-rank {rank} of --nnodes 2" in str(end) for end in ends)


async def test_a_host_that_waits_for_others_says_so(caplog: pytest.LogCaptureFixture) -> None:
    meeting = _meeting(nodes=3, timeout=1.0)
    head = asyncio.ensure_future(Head(meeting, lambda _: None).meet())
    with caplog.at_level("INFO"), pytest.raises(EngineDead, match="did not come within"):
        await _join(_like(meeting, timeout=0.8))
    with pytest.raises(EngineDead, match="of --nnodes 3 did not come"):
        await head
    assert "is there; waiting until all hosts are" in caplog.text


def test_secrets_differ_by_token_and_purpose() -> None:
    made = {tcp.derived(token, purpose) for token in ("a" * 16, "b" * 16) for purpose in ("hosts", "links")}
    assert len(made) == 4
    assert all(len(secret) == tcp.SECRET_BYTES for secret in made)
    assert tcp.derived("a" * 16, "hosts") in made
