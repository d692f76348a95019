"""Where a collective group meets: on the address of the HTTP server, and on no other."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from rollout_server.worker.extension import Operations
from rollout_server.worker.receiving_group import ReceivingGroup, meeting_host
from shared.collective import GREETING
from shared.errors import LockstepError


def _listening(port: int) -> set[str]:
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_the_store_listens_where_the_server_does(bind: str) -> None:
    group = ReceivingGroup(torch.device("cpu"))
    port = group.host(bind, timeout=5.0)
    assert _listening(port) == {bind}
    store = dist.TCPStore(meeting_host(bind), port, is_master=False, timeout=timedelta(seconds=5))
    store.set("met", "here")
    assert store.get("met") == b"here"


def test_ranks_meet_there() -> None:
    first, second = (ReceivingGroup(torch.device("cpu")) for _ in range(2))
    port = first.host("127.0.0.2", timeout=10.0)
    joining = [
        threading.Thread(target=worker.join, args=("g", "127.0.0.2", port, rank, 3, 10.0), daemon=True)
        for rank, worker in ((1, first), (2, second))
    ]
    for thread in joining:
        thread.start()
    store = dist.PrefixStore("g", dist.TCPStore("127.0.0.2", port, is_master=False, timeout=timedelta(seconds=10)))
    learner = dist.ProcessGroupGloo(store, 0, 3, timedelta(seconds=10))
    learner.broadcast([torch.tensor([GREETING])], dist.BroadcastOptions()).wait()
    for thread in joining:
        thread.join(10)
    assert not any(thread.is_alive() for thread in joining)
    sent, received = torch.arange(5), [torch.zeros(5, dtype=torch.int64) for _ in range(2)]
    taking = [
        threading.Thread(target=worker.receive, args=(buffer, 10.0), daemon=True)
        for worker, buffer in zip((first, second), received, strict=True)
    ]
    for thread in taking:
        thread.start()
    learner.broadcast([sent], dist.BroadcastOptions()).wait()
    for thread in taking:
        thread.join(10)
    assert all(torch.equal(buffer, sent) for buffer in received)


class _Process:
    """Sockets and threads of this process, which a group that was left must give back."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[int, int]:
        process = psutil.Process()
        return len(process.net_connections("tcp")), process.num_threads()

    def as_before(self) -> bool:
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            gone = [now <= before for now, before in zip(self._now(), self._before, strict=True)]
            if all(gone):
                return True
            time.sleep(0.02)
        return False


def _operations() -> Operations:
    return Operations(SimpleNamespace(device=torch.device("cpu")), None)


def _ignore() -> None: ...


def test_the_store_is_closed_once_all_have_met() -> None:
    before, group = _Process(), ReceivingGroup(torch.device("cpu"))
    port = group.host("127.0.0.1", timeout=5.0)
    joining = threading.Thread(target=group.join, args=("g", "127.0.0.1", port, 1, 2, 10.0), daemon=True)
    joining.start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
    learner = dist.ProcessGroupGloo(dist.PrefixStore("g", store), 0, 2, timedelta(seconds=10))
    learner.broadcast([torch.tensor([GREETING])], dist.BroadcastOptions()).wait()
    joining.join(10)
    group.close_store()
    assert not _listening(port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1.0)
    with pytest.raises(RuntimeError):
        store.set("from a stranger who was there in time", "x" * 2**20)
    buffer = torch.zeros(5)
    receiving = threading.Thread(target=group.receive, args=(buffer, 10.0), daemon=True)
    receiving.start()
    learner.broadcast([torch.ones(5)], dist.BroadcastOptions()).wait()
    receiving.join(10)
    assert torch.equal(buffer, torch.ones(5)), "the group needs no store any more"
    group.abort()
    learner.abort()
    del learner, store
    assert before.as_before()


@pytest.mark.parametrize("learner_comes", [False, True])
def test_a_join_that_fails_leaves_nothing(learner_comes: bool) -> None:
    before, operations = _Process(), _operations()
    port = operations.host_group(_ignore, "g", "127.0.0.1", 1.0)["port"]
    learner: list[Any] = []

    def meet() -> None:  # and never greet
        store = dist.PrefixStore("g", dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5)))
        learner.append(dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=5)))

    coming = threading.Thread(target=meet, daemon=True)
    if learner_comes:
        coming.start()
    with pytest.raises((RuntimeError, LockstepError)):
        operations.join_group(_ignore, "g", "127.0.0.1", port, 1, 2, 1.0)
    assert not _listening(port)
    if learner_comes:
        coming.join(10)
    learner.clear()
    operations.leave_group(_ignore, "g")
    assert before.as_before()


@pytest.mark.parametrize("op", ["host_group", "join_group", "close_store"])
def test_a_group_that_was_left_is_not_made_afterwards(op: str) -> None:
    """Calls have threads of their own, so that the one that leaves may come first."""
    operations = _operations()
    operations.leave_group(_ignore, "g")
    arguments = {
        "host_group": ("127.0.0.1", 1.0),
        "join_group": ("127.0.0.1", 1, 1, 2, 1.0),
        "close_store": (),
    }
    with pytest.raises(LockstepError, match="left"):
        getattr(operations, op)(_ignore, "g", *arguments[op])
    assert not operations.groups


def test_a_group_that_is_left_while_it_is_joined_ends() -> None:
    before, operations = _Process(), _operations()
    port = operations.host_group(_ignore, "g", "127.0.0.1", 20.0)["port"]
    failures: list[BaseException] = []

    def join() -> None:
        try:
            operations.join_group(_ignore, "g", "127.0.0.1", port, 1, 2, 20.0)
        except (RuntimeError, LockstepError) as error:
            failures.append(error.with_traceback(None))

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    time.sleep(0.2)
    started = time.monotonic()
    operations.leave_group(_ignore, "g")
    joining.join(10)
    assert failures
    assert time.monotonic() - started < 5.0, "it does not wait for a learner that will not come"
    assert before.as_before()
