"""A real trainer on several fake servers: pushes, a restart, and newcomers, compatible or not."""

from __future__ import annotations

import json
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.trainer.attach import attach
from shared.errors import ErrorCode, LockstepError
from tests.support.fake_server import FakeServer


@pytest.fixture
def servers(model_dir, server_state):
    """Three of the same base."""
    return {
        f"http://s{i}": FakeServer(
            AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            server_state.model_copy(update={"epoch": f"e{i}"}),
        )
        for i in range(3)
    }


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "servers.txt"
    path.write_text("http://s0\nhttp://s1\n")
    return path


@pytest.fixture
def pool(servers, listed, monkeypatch):
    monkeypatch.setattr("learner.servers.pool._DISCOVER_S", 0.02)
    pool = ServerPool(
        lambda url: RolloutClient(url, transport=servers[url].transport),
        ServerDiscovery([f"file:{listed}"]),
        patience_s=30.0,
    )
    pool.wait_ready(5.0)
    yield pool
    pool.close()


def wait(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(server):
    return [version.step for version in server.pushed if version.run_id == "r"]


def test_all_are_pushed_to_and_proven(make_trainer, servers, pool, listed):
    """s1 restarts after the first step; s2 joins then."""
    trainer = make_trainer(max_steps=3)
    session = attach(trainer, pool=pool, run_id="r", proof_canary=True)

    def after(report):
        if report.step == 1:
            servers["http://s1"].restart()
            listed.write_text("".join(f"{url}\n" for url in servers))
            wait(lambda: "r" in servers["http://s1"].served and servers["http://s2"].served)

    session.metrics.listeners.append(after)
    trainer.train()
    session.close()
    assert steps(servers["http://s0"]) == [0, 1, 2, 3]
    assert steps(servers["http://s1"]) == [0, 1, 1, 2, 3]
    assert steps(servers["http://s2"]) == [1, 2, 3]
    assert session.proof.max_mismatch < 1e-4
    assert abs(session.canary.slope - 1) < 0.01
    assert all(server.generated for server in servers.values())
    log = [json.loads(line) for line in (session.trainer.output_dir / "servers.jsonl").read_text().splitlines()]
    events = [(line["server"], line["event"][:6]) for line in log if "event" in line]
    assert events[:2] == [("http://s0", "serves"), ("http://s1", "serves")]
    assert {("http://s1", "lost: "), ("http://s2", "is new"), ("http://s2", "serves")} <= set(events)
    sampled = sum(line.get("tokens", 0) for line in log)
    assert sampled == session.rollouts.stats.completion_tokens
    assert trainer.state.log_history[0]["lockstep/servers_up"] == 2


@pytest.mark.parametrize("wrong", ["weights", "dtype", "context"])
def test_an_incompatible_newcomer_is_refused(make_trainer, servers, pool, listed, wrong, caplog):
    newcomer = servers["http://s2"]
    if wrong == "weights":  # under the same fingerprint: only its answers tell
        for parameter in newcomer.base.values():
            parameter.mul_(1.1)
    else:
        change = {"lora_dtype": "bfloat16"} if wrong == "dtype" else {"max_model_len": 64}
        newcomer.state = newcomer.state.model_copy(update=change)
    trainer = make_trainer(max_steps=2)
    session = attach(trainer, pool=pool, run_id="r")

    def after(report):
        if report.step == 1:
            listed.write_text("".join(f"{url}\n" for url in servers))
            wait(lambda: any("refused" in line for line in caplog.messages))

    session.metrics.listeners.append(after)
    trainer.train()
    session.close()
    assert not newcomer.pushed
    assert steps(servers["http://s0"]) == [0, 1, 2]


def test_a_wrong_receipt_is_not_recoverable(make_trainer, servers, pool):
    trainer = make_trainer(max_steps=2)
    session = attach(trainer, pool=pool, run_id="r", proof_canary=False)
    liar = servers["http://s1"]
    push = liar._push

    def lie(run_id, request):
        receipt = push(run_id, request)
        return receipt.model_copy(update={"workers": 7}) if len(steps(liar)) > 1 else receipt

    liar._push = lie
    with pytest.raises(LockstepError, match="workers that acknowledged: 7 instead of 1") as caught:
        trainer.train()
    session.close()
    assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH
