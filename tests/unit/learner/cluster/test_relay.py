"""Pushes through relays: as direct ones, but that the body leaves the learner once."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.fleet.simulated import SimulatedServer, serving
from learner.cluster.relay import Relay, Relays, Request
from learner.config import LearnerConfig
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.session import _relays
from learner.sync.publisher import Publisher
from shared.errors import ErrorCode, LockstepError

TOKEN = "a-token-of-the-servers"


class FakeRay:
    """Ray's calls that relays make, carried out at once in this process.

    Attributes:
        places: node of each URL, as the directory lists it.
        stored: objects that were put into the store.
        dead: nodes whose relays answer nothing.
    """

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.stored: list[Any] = []
        self.dead: set[str] = set()
        self.started: list[str] = []
        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
        self.util = SimpleNamespace(scheduling_strategies=strategies)
        self.exceptions = SimpleNamespace(GetTimeoutError=TimeoutError, RayError=RuntimeError)

    def put(self, value: Any) -> Any:
        self.stored.append(value)
        return value

    def get(self, reference: Any, timeout: float) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    def get_actor(self, name: str, namespace: str) -> Any:
        return SimpleNamespace(members=SimpleNamespace(remote=lambda: dict(self.places)))

    def remote(self, kind: type) -> Any:
        def options(num_cpus: int, scheduling_strategy: str) -> Any:
            def start(ca: str | None) -> Any:
                self.started.append(scheduling_strategy)
                relay = kind(ca)

                def put(*arguments: Any) -> Any:
                    if scheduling_strategy in self.dead:
                        return RuntimeError("the node has died")
                    return relay.put(*arguments)

                return SimpleNamespace(put=SimpleNamespace(remote=put))

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr("learner.cluster.relay.connect", lambda: fake)
    return fake


@pytest.fixture
def servers():
    return [SimulatedServer(tokens=1, decode_s=0.0, token=TOKEN) for _ in range(3)]


@pytest.fixture
def publisher(ray, servers, model_dir):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(target_modules=["q_proj"]))
    with serving(servers) as urls:
        ray.places = dict(zip(urls, ("first", "first", "second"), strict=True))
        pool = ServerPool(lambda url: RolloutClient(url, TOKEN), ServerDiscovery(urls))
        pool.wait_ready(60.0)
        yield Publisher(pool, model, Lease("r", "secret", 0), transport="http", relays=Relays("fleet"), relay_from=3)
        pool.close()


@pytest.fixture
def direct(monkeypatch):
    """URLs that the learner has pushed to itself."""
    pushed, push = [], RolloutClient.push

    def counted(client, *args, **kwargs):
        pushed.append(client.url)
        return push(client, *args, **kwargs)

    monkeypatch.setattr(RolloutClient, "push", counted)
    return pushed


def test_a_body_is_stored_once_and_every_receipt_comes_back(publisher, servers, ray, direct):
    for step in (0, 1):
        publisher.push(step)
        assert [server.served.version.step for server in servers] == [step] * 3
        assert {replica.receipt.epoch for replica in publisher.pool.up()} == {server.epoch for server in servers}
    assert direct == []
    assert len(ray.stored) == 2
    assert ray.started == ["first", "second"], "a relay is started once for each node"
    assert all(server.bytes == servers[0].bytes > 0 for server in servers)


def test_few_servers_are_sent_to_directly(publisher, ray, direct):
    publisher.relay_from = 4
    publisher.push(0)
    assert sorted(direct) == sorted(ray.places)
    assert ray.stored == []


def test_what_a_relay_does_not_reach_is_sent_directly_and_said_once(publisher, servers, ray, direct, caplog):
    ray.dead = {"first"}
    with caplog.at_level(logging.WARNING, "lockstep.cluster"):
        for step in (0, 1):
            publisher.push(step)
    assert [server.served.version.step for server in servers] == [1] * 3
    assert sorted(direct) == sorted([url for url, node in ray.places.items() if node == "first"] * 2)
    assert len(caplog.messages) == 1
    assert "the node has died" in caplog.text


def test_no_cluster_is_no_failure(publisher, servers, direct, monkeypatch, caplog):
    def fail():
        raise OSError("no such cluster")

    monkeypatch.setattr("learner.cluster.relay.connect", fail)
    publisher.push(0)
    assert len(direct) == 3
    assert "no such cluster" in caplog.text


def test_a_server_that_the_directory_does_not_list_is_sent_to_directly(publisher, servers, ray, direct):
    [url] = [url for url, node in ray.places.items() if node == "second"]
    del ray.places[url]
    publisher.push(0)
    assert direct == [url]
    assert servers[2].served.version.step == 0


def test_a_refusal_through_a_relay_is_the_servers(publisher, servers, direct):
    publisher.push(0)
    servers[1].lease = "of another learner"
    with pytest.raises(LockstepError, match="take the run over") as caught:
        publisher.push(1)
    assert caught.value.code is ErrorCode.LEASE_MISMATCH
    assert direct == []
    assert servers[2].served.version.step == 1, "the others have it all the same"
    assert [replica.receipt.version.step for replica in publisher.pool.up()] == [1, 0, 1]


def test_a_body_that_changed_on_its_way_is_not_served(publisher, servers, direct, monkeypatch):
    put = Relay.put

    def spoiling(relay, pieces, requests, timeout_s):
        header, tensors = (bytearray(piece) for piece in pieces)
        tensors[7] ^= 1
        return put(relay, [header, tensors], requests, timeout_s)

    monkeypatch.setattr(Relay, "put", spoiling)
    with pytest.raises(LockstepError) as caught:
        publisher.push(0)
    assert caught.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert [server.served for server in servers] == [None] * 3


@pytest.mark.parametrize("change", [{"checksum": "0" * 32}, {"workers": 2}, {"modules": 1}])
def test_a_wrong_receipt_through_a_relay_is_an_error(publisher, servers, monkeypatch, change):
    install = SimulatedServer.install

    def lying(server, body, lease):
        return install(server, body, lease).model_copy(update=change if server is servers[2] else {})

    monkeypatch.setattr(SimulatedServer, "install", lying)
    with pytest.raises(LockstepError, match="receipt") as caught:
        publisher.push(0)
    assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH


def test_servers_on_a_cluster_have_relays():
    assert _relays(LearnerConfig(rollout_url=["ray:fleet"])) is not None
    assert _relays(LearnerConfig(rollout_url=["http://127.0.0.1:8000"])) is None


def test_a_late_relay_is_left_alone_for_a_while(ray, monkeypatch) -> None:
    ray.places["http://a:1"] = "node-1"
    ray.get, ray.killed = lambda reference, timeout: _late() if timeout == 0.0 else reference, []
    ray.kill = ray.killed.append
    monkeypatch.setattr("learner.cluster.relay._START_S", -1.0)  # it is late at once
    relays = Relays("mine")
    for _ in range(3):
        assert relays.put([b"x"], {"http://a:1": Request("http://a:1", {})}, 0.5) == {}
    assert ray.started == ["node-1"]
    assert len(ray.killed) == 1


def _late() -> None:
    raise TimeoutError
