"""`ray:NAME`: what the directory lists, and what a learner makes of it; over a Ray that only pretends."""

from __future__ import annotations

import builtins
import socket
from typing import Any

import pytest

from learner.cluster import connection, directory
from learner.cluster.directory import make_directory
from learner.config import LearnerConfig
from learner.servers.discovery import ServerDiscovery
from shared.errors import InvalidRequest
from tests.support.fake_ray import ActorDiedError, FakeRay


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(**{"10_0_0_1": {"CPU": 1.0}})
    monkeypatch.setattr(directory, "connect", lambda: fake)
    return fake


def test_servers_come_and_go_and_move(ray: FakeRay) -> None:
    listed = make_directory(ray, "mine", None)
    discovery = ServerDiscovery(["ray:mine"])
    assert discovery.may_change
    assert discovery.urls() == []
    listed.announce.remote("server-1", "http://10.0.0.1:1", "node-1")
    listed.announce.remote("server-2", "http://10.0.0.2:1", "node-2")
    assert discovery.urls() == ["http://10.0.0.1:1", "http://10.0.0.2:1"]
    listed.announce.remote("server-1", "http://10.0.0.3:1", "node-3")
    assert directory.members("mine") == {"http://10.0.0.3:1": "node-3", "http://10.0.0.2:1": "node-2"}


def test_a_directory_that_is_gone_keeps_the_last_servers(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_directory(ray, "mine", None).announce.remote("server-1", "http://10.0.0.1:1", "node-1")
    discovery = ServerDiscovery(["ray:mine"])
    assert discovery.urls() == ["http://10.0.0.1:1"]

    def get(reference: Any, timeout: float) -> None:
        raise ActorDiedError("the actor died")

    monkeypatch.setattr(ray, "get", get)
    assert [discovery.urls() for _ in range(2)] == [["http://10.0.0.1:1"]] * 2
    assert len([line for line in caplog.messages if "the actor died" in line]) == 1


def test_a_name_that_nobody_has_says_which_there_are(ray: FakeRay) -> None:
    make_directory(ray, "mine", None)
    with pytest.raises(InvalidRequest, match="no servers called yours on this Ray cluster: there are mine"):
        ServerDiscovery(["ray:yours"])


def test_its_servers_may_be_several() -> None:
    with pytest.raises(InvalidRequest, match="deterministic"):
        LearnerConfig(rollout_url=["ray:mine"], deterministic=True).require_urls()


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_import = builtins.__import__

    def no_ray(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return whole_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_ray)
    with pytest.raises(InvalidRequest, match=r"pip install 'lockstep-rl\[cluster\]'"):
        connection.connect()


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:1", "ray:", "127.0.0.1:port"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is none of auto, HOST:6379 and ray://HOST:10001"):
        connection.connect(address)


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=f"no Ray cluster at {address}: Connection refused"):
            connection.connect(address)
