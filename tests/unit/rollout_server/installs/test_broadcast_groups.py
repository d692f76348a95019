"""Where a collective group meets: on the address of the HTTP server, and on no other."""

from __future__ import annotations

import threading
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from rollout_server.worker.receiving_group import ReceivingGroup, meeting_host
from shared.collective import GREETING


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
