"""A push through a real Ray cluster: what the learner sends, whose receipts come back, and what Ray's files say."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.fleet.cluster import NAME, cluster_of
from bench.fleet.sockets import bytes_sent
from bench.scale import simulated
from learner.cluster.relay import Relays
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from shared.bearer_tokens import TOKEN_VARIABLE

TOKEN = "a-token-that-must-not-be-seen"


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, TOKEN)
        started = simulated(3)
        servers = started.__enter__()
    handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        with cluster_of(2, servers):
            yield servers
    finally:
        signal.signal(signal.SIGTERM, handler)
        started.__exit__(None, None, None)


def test_relays_send_what_the_learner_has_stored_once(urls: list[str], model: Path, caplog) -> None:
    import ray

    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    pool = ServerPool(lambda url: RolloutClient(url, TOKEN), ServerDiscovery([f"ray:{NAME}"]))
    assert sorted(replica.url for replica in pool.wait_ready(120.0)) == sorted(urls)
    relays = Relays(NAME)
    publisher = Publisher(pool, adapter, Lease("r", "secret", 0), transport="http", relays=relays, relay_from=3)
    publisher.push(0)  # starts the relays

    before = bytes_sent()
    publisher.push(1)
    sent, size = bytes_sent() - before, sum(len(piece) for piece in publisher.pieces())
    assert sent < size / 3, f"{sent} bytes sent for an adapter of {size}, to three servers"
    receipts = {replica.receipt.epoch: replica.receipt for replica in pool.up() if replica.receipt}
    assert len(receipts) == 3
    assert {receipt.version.step for receipt in receipts.values()} == {1}
    assert {receipt.bytes for receipt in receipts.values()} == {size}

    publisher.relay_from = 4
    before = bytes_sent()
    publisher.push(2)
    assert bytes_sent() - before > 3 * size, "the count sees what is sent directly"

    publisher.relay_from = 3
    [node, *_] = relays._actors
    ray.kill(relays._actors[node])
    with caplog.at_level(logging.WARNING, "lockstep.cluster"):
        publisher.push(3)
    assert "directly" in caplog.text
    assert {replica.receipt.version.step for replica in pool.up() if replica.receipt} == {3}
    publisher.push(4)  # through a relay that was started again
    assert {replica.receipt.version.step for replica in pool.up() if replica.receipt} == {4}

    node_process: Any = ray._private.worker._global_node
    session = Path(node_process.get_session_dir_path())
    logs = [path for path in session.rglob("*") if path.is_file()]
    assert logs
    assert [path for path in logs if TOKEN.encode() in path.read_bytes()] == []
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert [line for line in lines if TOKEN.encode() in line] == []
    pool.close()
