"""Pushes by broadcast (gloo here, NCCL between GPUs: the same code), and failures of one side."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from learner.sync.transport import SendingGroup
from shared.errors import ErrorCode, LockstepError
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import ServerProcess, running_server

TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A separate server, whose workers have a shorter timeout for broadcasts."""
    flags = [*FLAGS, "--collective-timeout", str(TIMEOUT_S), "--push-timeout", "12"]
    with running_server(model, tmp_path_factory.mktemp("server"), *flags) as process:
        yield process


class _Learner:
    """A publisher and its policy."""

    def __init__(self, client: RolloutClient, model: Path, run_id: str) -> None:
        self.policy = P.make_policy(model)
        self.client = client
        self.publisher = Publisher(
            ServerPool.of(client),
            self.policy,
            Lease(run_id, P.LEASE, 0),
            takeover=True,
            transport="collective",
        )

    def push(self, step: int) -> str:
        """Push new weights, check that they are served, and return the transport."""
        P.randomize(self.policy, seed=step)
        receipt = self.publisher.push(step)
        gap = (P.score(self.client, PROBE) - P.reference(self.policy, PROBE)).abs().max()
        assert gap < FP32
        return receipt.transport


@pytest.fixture
def learner(client: RolloutClient, model: Path, request: pytest.FixtureRequest) -> Iterator[_Learner]:
    learner = _Learner(client, model, request.node.name.replace("_", "-")[:60])
    yield learner
    learner.publisher.close()


def test_pushes_go_by_broadcast_from_the_second_on(learner: _Learner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lockstep.sync")
    assert [learner.push(step) for step in range(4)] == ["http", "collective", "collective", "collective"]
    (message,) = (record.getMessage() for record in caplog.records if record.name == "lockstep.sync")
    assert "by broadcast from now on" in message
    announced = learner.publisher._exporter.export(learner.publisher.version(3)).announcement()
    (again,) = learner.client.broadcast(learner.publisher.lease.run_id, announced, P.LEASE)
    assert again is not None, "a push that is sent again is recognized before anything is sent"
    assert again.repeated, "a push that is sent again is recognized before anything is sent"
    assert learner.push(4) == "collective"


def test_a_refused_broadcast_changes_nothing_and_the_group_goes_on(learner: _Learner) -> None:
    learner.push(0)
    assert learner.push(5) == "collective"
    served = P.score(learner.client, PROBE)
    with pytest.raises(LockstepError) as refused:
        learner.publisher.push(4)
    assert refused.value.code is ErrorCode.STALE_VERSION
    with torch.no_grad():
        next(p for n, p in learner.policy.named_parameters() if "lora_B" in n).view(-1)[0] = float("nan")
    learner.publisher._exporter._check_finite = lambda version: None  # type: ignore[method-assign]
    with pytest.raises(LockstepError) as refused:
        learner.publisher.push(6)
    assert refused.value.code is ErrorCode.NOT_FINITE
    assert torch.equal(P.score(learner.client, PROBE), served)
    assert learner.push(7) == "collective"


def test_a_learner_that_announces_and_never_sends(learner: _Learner, caplog: pytest.LogCaptureFixture) -> None:
    """The old version stays served, the workers time out, and the next push falls back to HTTP with a message."""
    caplog.set_level("INFO", "lockstep.sync")
    learner.push(0)
    assert learner.push(1) == "collective"
    served = P.score(learner.client, PROBE)
    export = learner.publisher._exporter.export(learner.publisher.version(2))
    started = time.monotonic()
    with pytest.raises(LockstepError) as silent:
        for event in learner.client.broadcast(learner.publisher.lease.run_id, export.announcement(), P.LEASE):
            assert event is None
            assert torch.equal(P.score(learner.client, PROBE), served), "serving goes on meanwhile"
    assert silent.value.code is ErrorCode.TIMEOUT
    assert time.monotonic() - started < TIMEOUT_S + 10
    assert torch.equal(P.score(learner.client, PROBE), served)
    assert learner.push(3) == "http"
    assert "over HTTP" in caplog.messages[-1]
    (transport,) = learner.publisher._transports.values()
    transport._retry_at = 0.0
    assert learner.push(4) == "http", "the group is joined again"
    assert learner.push(5) == "collective", "the group is joined again"


def test_a_learner_that_hangs_up_after_the_announcement(learner: _Learner) -> None:
    learner.push(0)
    assert learner.push(1) == "collective"
    export = learner.publisher._exporter.export(learner.publisher.version(2))
    events = learner.client.broadcast(learner.publisher.lease.run_id, export.announcement(), P.LEASE)
    assert next(events) is None
    events.close()
    started = time.monotonic()
    assert learner.push(3) == "http"
    assert time.monotonic() - started < TIMEOUT_S + 10
    states = [slot["state"] for slot in learner.client.run(learner.publisher.lease.run_id).slots]
    assert sorted(states) == ["active", "free"]


def test_an_engine_that_is_stopped_ends_in_an_error_within_the_deadline(
    learner: _Learner, server: ServerProcess
) -> None:
    learner.push(0)
    assert learner.push(1) == "collective"
    stopped = server.engine_processes()
    assert stopped
    learner.client.push_timeout_s = 2 * TIMEOUT_S
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(LockstepError) as error:
            P.randomize(learner.policy, seed=9)
            learner.publisher.push(2)
        assert error.value.code in (ErrorCode.TIMEOUT, ErrorCode.INSTALL_FAILED)
        assert time.monotonic() - started < 2 * (2 * TIMEOUT_S) + 10
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    learner.client.push_timeout_s = 60.0
    assert learner.push(3) == "http", "what was cut short does no harm once the engine goes on"


def test_collective_is_refused_where_there_can_be_no_group(client: RolloutClient) -> None:
    state = client.state().model_copy(update={"devices": ["GPU-1"], "device": "cuda"})
    from learner.sync.transport import can_broadcast

    assert "cuda" in str(can_broadcast(torch.device("cpu"), state))


def test_a_stranger_cannot_join_a_runs_group(learner: _Learner) -> None:
    learner.push(0)
    stranger = replace(learner.publisher.lease, secret="somebody-else")
    with pytest.raises(LockstepError) as refused:
        SendingGroup(learner.client, stranger, torch.device("cpu"))
    assert refused.value.code is ErrorCode.LEASE_MISMATCH
