"""Leases, fences, and receipts."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from learner.run_dir.lease import Lease, load_lease, save_lease
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from shared.errors import ErrorCode, LockstepError
from shared.weights import RunState, WeightVersion


@pytest.fixture
def publisher(model_dir, client):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(target_modules=["q_proj"]))
    return Publisher(ServerPool.of(client), model, Lease("r", "secret", 0))


def test_lease_is_kept_private_and_its_fence_grows(tmp_path):
    first = load_lease(tmp_path / "My Run!", None)
    assert first.fence == 0
    assert first.run_id.startswith("My-Run-")
    save_lease(tmp_path, first)
    path = tmp_path / "lease.json"
    assert path.stat().st_mode & 0o777 == 0o600
    again = load_lease(tmp_path, None)
    assert (again.run_id, again.secret, again.fence) == (first.run_id, first.secret, 1)
    other = load_lease(tmp_path, "another")
    assert other.run_id == "another"
    assert other.secret != first.secret
    assert other.fence == 0
    path.write_text("{")
    with pytest.raises(LockstepError, match="damaged"):
        load_lease(tmp_path, None)


def test_fence_is_above_what_is_served(model_dir, client, server_state, publisher):
    served = WeightVersion(run_id="r", fence=5, step=9)
    run = RunState(run_id="r", version=served, checksum="c", install_seq=1, slots=[], running_requests=0)
    state = server_state.model_copy(update={"runs": [run]})
    assert Publisher(ServerPool.of(client, state), publisher.model, Lease("r", "s", 2)).version(0) > served


def test_pushes_again_only_where_the_step_differs(publisher, server):
    publisher.push(1)
    publisher.ensure(1)
    assert len(server.pushed) == 1
    publisher.ensure(2)
    assert [v.step for v in server.pushed] == [1, 2]
    assert len(publisher.seconds) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"checksum": "0" * 32},
        {"modules": 1},
        {"workers": 0},
        {"version": {"run_id": "r", "fence": 0, "step": 0}},
    ],
)
def test_a_wrong_receipt_is_an_error(publisher, client, monkeypatch, change):
    push = client.push

    def lying(*args, **kwargs):
        receipt = push(*args, **kwargs)
        return type(receipt).model_validate(json.loads(receipt.model_dump_json()) | change)

    monkeypatch.setattr(client, "push", lying)
    with pytest.raises(LockstepError, match="receipt") as caught:
        publisher.push(1)
    assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH
    assert not publisher.receipts


def test_an_evaluation_after_the_end_has_its_run_for_itself(publisher, server):
    """Until then it may have given way to another; and while it is needed it must not."""
    publisher.push(1)
    publisher.finish(0.0)
    server.served.pop("r")
    publisher.ensure(1)
    assert [v.step for v in server.pushed] == [1, 1]
    assert not server.finished
    publisher.ensure(1)
    assert len(server.pushed) == 2


def test_a_server_that_is_caught_up_late_hears_of_the_end(publisher, server, client, monkeypatch):
    """It restarted; the training ended while its last push was under way to it again."""
    publisher.push(1)
    server.restart()
    (replica,) = publisher.pool.replicas.values()
    push = client.push

    def push_when_finished(*args, **kwargs):
        publisher.finish(30.0)
        assert not server.finished
        return push(*args, **kwargs)

    monkeypatch.setattr(client, "push", push_when_finished)
    publisher.catch_up(replica, lambda *_: None)
    assert server.finished["r"].keep_seconds == 30.0
    publisher.catch_up(replica, lambda *_: None)
    assert len(server.pushed) == 2
