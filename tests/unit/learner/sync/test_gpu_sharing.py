"""`share_gpu`: the server sleeps while the learner computes, and is awake for every request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from trl import GRPOTrainer

from learner import attach
from learner.config import LearnerConfig
from learner.servers.client import RolloutClient
from learner.servers.replica import Replica
from learner.sync.gpu_sharing import GpuSharing, check_shared_gpu
from shared.errors import InvalidRequest, LockstepError
from shared.weights import ServerState
from tests.support.fake_server import FakeServer

MakeTrainer = Callable[..., GRPOTrainer]


@pytest.fixture(autouse=True)
def _shares(server: FakeServer) -> None:
    server.state = server.state.model_copy(update={"shares_gpu": True, "devices": [None]})


def test_training_in_turns(make_trainer: MakeTrainer, server: FakeServer, client: RolloutClient) -> None:
    """The fake server fails whatever it is asked in its sleep; a pass for the gradient must find it asleep."""
    server.state = server.state.model_copy(update={"asleep": True})  # an earlier learner was killed
    trainer = make_trainer(
        steps_per_generation=2,
        num_iterations=2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        trainer_kwargs={"eval_dataset": [{"prompt": f"w{i} w3"} for i in range(4)]},
    )
    session = attach(trainer, client=client, run_id="r", share_gpu=True, proof_canary=True)
    asleep: list[bool] = []
    trainings = 0

    def watch(*_: Any) -> None:
        nonlocal trainings
        if torch.is_grad_enabled():
            trainings += trainer.model.training
            asleep.append(server.state.asleep)

    trainer.model.register_forward_pre_hook(watch)
    trainer.train()
    assert trainings == 6
    assert len(asleep) > 6, "those of the canary"
    assert all(asleep)
    assert server.naps >= 6, "every step is followed by a push, which wakes it"
    assert not server.state.asleep, "a server is left awake"
    assert session.proof is not None
    assert session.proof.max_mismatch < 1e-4


def test_a_training_that_fails_leaves_the_server_awake(
    make_trainer: MakeTrainer, server: FakeServer, client: RolloutClient
) -> None:
    trainer = make_trainer()
    session = attach(trainer, client=client, run_id="r", share_gpu=True)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert server.state.asleep
    session.close()
    assert not server.state.asleep


def test_without_it_nobody_sleeps(make_trainer: MakeTrainer, server: FakeServer, client: RolloutClient) -> None:
    trainer = make_trainer()
    attach(trainer, client=client, run_id="r")
    trainer.train()
    assert server.naps == 0


@pytest.mark.parametrize(
    ("state", "processes", "word"),
    [
        ({"shares_gpu": False}, 1, "--share-gpu"),
        ({}, 2, "2 learner processes"),
        ({"devices": ["GPU-1"]}, 1, "the server on GPU-1"),
    ],
)
def test_refused(server: FakeServer, state: dict[str, Any], processes: int, word: str) -> None:
    check_shared_gpu(server.state, torch.device("cpu"), 1)
    with pytest.raises(LockstepError, match=word):
        check_shared_gpu(server.state.model_copy(update=state), torch.device("cpu"), processes)


def test_incompatible_options() -> None:
    with pytest.raises(ValueError, match="max_staleness"):
        LearnerConfig(share_gpu=True, max_staleness=1)
    with pytest.raises(LockstepError, match=r"one (--)?rollout_url"):
        LearnerConfig(share_gpu=True, rollout_url=["http://a", "http://b"]).require_urls()


def sharing_with(answer: Callable[[httpx.Request], httpx.Response], state: ServerState) -> GpuSharing:
    client = RolloutClient("http://one", transport=httpx.MockTransport(answer))
    return GpuSharing(Replica(client, state))


def test_a_server_that_is_away_is_not_waited_for(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lockstep")

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    sharing = sharing_with(away, server.state)
    sharing.take_gpu()
    sharing.yield_gpu()
    assert len(caplog.messages) == 2
    assert all("http://one is away" in text for text in caplog.messages)


@pytest.mark.parametrize("lost", [1, 2])
def test_an_order_is_repeated_when_its_response_is_lost(server: FakeServer, lost: int) -> None:
    """At once, and where that fails too, at the next pass or request."""
    orders: list[str] = []

    def cut_off(request: httpx.Request) -> httpx.Response:
        orders.append(request.url.path)
        if len(orders) <= lost:
            raise httpx.RemoteProtocolError("cut off")
        return httpx.Response(200, json=server.state.model_copy(update={"asleep": True}).model_dump())

    sharing = sharing_with(cut_off, server.state)
    sharing.take_gpu()
    sharing.take_gpu()
    sharing.take_gpu()
    assert orders == ["/v1/sleep"] * (lost + 1)


def test_a_server_that_came_back_is_put_to_sleep_again(server: FakeServer) -> None:
    server.state = server.state.model_copy(update={"asleep": False})
    replica = Replica(RolloutClient("http://fake", transport=server.transport), server.state)
    sharing = GpuSharing(replica)
    sharing.take_gpu()
    sharing.take_gpu()
    assert server.naps == 1
    server.restart()
    server.state = server.state.model_copy(update={"asleep": False})
    replica.state = server.state
    sharing.take_gpu()
    assert server.naps == 2
    assert server.state.asleep


@pytest.mark.parametrize("status", [0, 400])
def test_unrecoverable_errors_are_raised(server: FakeServer, status: int) -> None:
    """No answer in time: it may be half asleep. A refusal: it has its GPU to itself, or others hold its memory."""

    def refuse(request: httpx.Request) -> httpx.Response:
        if not status:
            raise httpx.ReadTimeout("late")
        error = InvalidRequest("the server sleeps on")
        return httpx.Response(error.status, json=error.body().model_dump())

    sharing = sharing_with(refuse, server.state)
    with pytest.raises(LockstepError, match=r"sleeps on|deadline"):
        sharing.yield_gpu()


def test_an_evaluation_after_the_training_leaves_the_server_awake(
    make_trainer: MakeTrainer, server: FakeServer, client: RolloutClient
) -> None:
    trainer = make_trainer(
        per_device_eval_batch_size=8, trainer_kwargs={"eval_dataset": [{"prompt": f"w{i} w3"} for i in range(4)]}
    )
    attach(trainer, client=client, run_id="r", share_gpu=True)
    trainer.train()
    naps = server.naps
    trainer.evaluate()
    assert server.naps > naps
    assert not server.state.asleep
