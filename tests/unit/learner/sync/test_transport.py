"""The learner's end of a collective group: one that fails, or is left, gives back its sockets and threads at once."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from learner.run_dir.lease import Lease
from learner.sync import transport
from learner.sync.transport import SendingGroup, Transport, can_broadcast
from shared.collective import NCCL_SETTINGS, Announcement, GroupInvitation
from shared.errors import ErrorCode, InstallFailed, LockstepError
from shared.weights import WeightVersion

CPU = torch.device("cpu")
LEASE = Lease("r", "a lease of tests", 0)


class _Server:
    """A server with one worker, rank 1, that meets the learner and then does as `ending` says."""

    url = "http://127.0.0.1:1"

    def __init__(self, ending: str = "joined", host: str | None = None) -> None:
        self.ending, self.met, self.host = ending, threading.Event(), host
        self.store: Any = None
        self.group: Any = None

    def join_group(self, run_id: str, secret: str) -> Iterator[GroupInvitation | None]:
        if self.ending == "uninvited":
            return
        limit = timedelta(seconds=1.0)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        port = self.store.port
        invitation = GroupInvitation(group="g", host=self.host, port=port, size=2, backend="gloo", timeout_s=1.0)
        if self.ending == "nobody":
            self.store = None
            yield invitation
            return
        worker = threading.Thread(target=self._work, args=(port,), daemon=True)
        worker.start()
        yield invitation
        if self.ending == "refused":
            raise InstallFailed("a worker did not join")
        if self.ending == "joined":
            self.met.wait(5.0)
            yield None

    def _work(self, port: int) -> None:
        store = dist.PrefixStore("g", dist.TCPStore("127.0.0.1", port, is_master=False))
        self.group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=5))
        self.group.broadcast([torch.zeros(1, dtype=torch.int64)], dist.BroadcastOptions()).wait()
        self.met.set()

    def broadcast(self, *_: Any, **__: Any) -> Iterator[None]:
        yield None  # and nobody receives

    def leave(self) -> None:
        self.store = self.group = None


def _resources() -> tuple[int, int]:
    process = psutil.Process()
    return len(process.net_connections("tcp")), process.num_threads()


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _all_given_back(before: tuple[int, int]) -> bool:
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        if all(now <= then for now, then in zip(_resources(), before, strict=True)):
            return True
        time.sleep(0.02)
    return False


def test_the_ranks_meet_where_the_invitation_says() -> None:
    server = _Server(host="127.0.0.1")
    server.url = "http://no-worker-is-here.invalid:1"
    group = SendingGroup(server, LEASE, CPU)  # type: ignore[arg-type]
    assert server.met.is_set()
    group.leave()
    server.leave()


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("uninvited", ErrorCode.NOT_READY),
        ("nobody", ErrorCode.TIMEOUT),
        ("refused", ErrorCode.INSTALL_FAILED),
        ("early", ErrorCode.NOT_READY),
    ],
)
def test_a_join_that_fails_leaves_nothing(ending: str, code: ErrorCode) -> None:
    before, server = _resources(), _Server(ending)
    with pytest.raises(LockstepError) as failure:
        SendingGroup(server, LEASE, CPU)  # type: ignore[arg-type]
    assert failure.value.code is code
    if ending in ("refused", "early"):
        assert server.met.wait(5.0)
    server.leave()
    assert _all_given_back(before), "while its error is still there"


@pytest.mark.usefixtures("without_gc")
def test_a_broadcast_that_nobody_takes_leaves_nothing() -> None:
    before, server = _resources(), _Server()
    group = SendingGroup(server, LEASE, CPU)  # type: ignore[arg-type]
    version = WeightVersion(run_id="r", step=1)
    announced = Announcement(version=version, checksum="sum", layout="key")
    with pytest.raises(LockstepError) as failure:
        group.push(announced, torch.zeros(2**24), "drain")
    assert failure.value.code is ErrorCode.TIMEOUT
    server.leave()
    assert _all_given_back(before), "while its error is still there"


@pytest.mark.usefixtures("without_gc")
def test_a_transport_that_is_closed_while_it_joins_leaves_nothing() -> None:
    before, server = _resources(), _Server()
    state = SimpleNamespace(devices=[None], device="cpu")
    replica = SimpleNamespace(client=server, known=state)
    transport = Transport(replica, LEASE, CPU, "collective", "drain")  # type: ignore[arg-type]
    joining = threading.Thread(target=transport._join)
    joining.start()
    transport.close()
    joining.join(10.0)
    assert transport._group is None
    server.leave()
    assert _all_given_back(before)


def test_one_gpu_for_both_is_refused_unless_nccl_takes_them_for_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "gpu_uuid", lambda device: "GPU-1")
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    shared, own = (SimpleNamespace(devices=[name], device="cuda") for name in ("GPU-1", "GPU-2"))
    cuda = torch.device("cuda")
    assert "share a GPU" in str(can_broadcast(cuda, shared))  # type: ignore[arg-type]
    assert can_broadcast(cuda, own) is None  # type: ignore[arg-type]
    monkeypatch.setenv("NCCL_HOSTID", "learner")
    assert can_broadcast(cuda, shared, asked=True) is None  # type: ignore[arg-type]
    assert can_broadcast(cuda, shared), "nobody asked for it"  # type: ignore[arg-type]


def test_what_is_set_of_nccl_is_what_torch_reads() -> None:
    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    unknown = [name for name in NCCL_SETTINGS if f'"{name}"' not in header.read_text()]
    assert not unknown
