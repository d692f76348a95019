"""What is waited for is said, how it stands, for how long, and what then; what is over soon is not mentioned."""

from __future__ import annotations

import logging
import queue
import re
import threading

import httpx
import pytest

from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.servers.replica import Replica
from learner.utils import waits
from learner.utils.threads import start
from learner.utils.waits import waiting
from shared.errors import NotReady


@pytest.fixture
def said(monkeypatch):
    """Mention waits at once, and return the mentions as they come."""
    monkeypatch.setattr(waits, "MENTIONS_S", (0.0, 0.001))
    mentions: queue.Queue[str] = queue.Queue()

    class Handler(logging.Handler):
        def emit(self, record):
            mentions.put(record.getMessage())

    handler = Handler()
    monkeypatch.setattr(waits.logger, "level", logging.INFO)
    waits.logger.addHandler(handler)
    yield mentions
    waits.logger.removeHandler(handler)


def test_a_wait_is_mentioned_again_and_again_and_its_end_once(said):
    progress = iter(["1 of 3", "2 of 3"])
    with waiting("a thing", limit_s=60, then="nothing more", detail=lambda: next(progress, "3 of 3")):
        assert said.get() == "waiting for a thing (1 of 3): 0 s of at most 60 s, then nothing more"
        assert said.get().startswith("waiting for a thing (2 of 3)")
        assert said.get().startswith("waiting for a thing (3 of 3)")
    rest = []
    while not rest or not rest[-1].startswith("waited"):
        rest.append(said.get())
    assert re.fullmatch(r"waited \d+ s for a thing", rest[-1])


def test_what_is_over_soon_or_has_failed_is_not_said_to_have_come(said, monkeypatch):
    with pytest.raises(KeyError), waiting("a thing"):
        said.get()
        raise KeyError
    monkeypatch.setattr(waits, "MENTIONS_S", (3600.0,))
    while not said.empty():
        assert said.get().startswith("waiting")
    with waiting("a thing"):
        pass
    assert said.empty()


def test_nothing_is_mentioned_after_the_end(said):
    asked, over = threading.Event(), threading.Event()

    def slow():
        asked.set()
        over.wait()
        return "1 of 3"

    with waiting("a thing", detail=slow):
        asked.wait()
    over.set()
    for thread in threading.enumerate():
        if thread.name == "lockstep-wait":
            thread.join()
    assert said.empty()


@pytest.mark.parametrize(
    ("answers", "words"),
    [(503, "it loads its model, or is about to leave"), (502, "it answers 502 on /ready"), (None, "cannot be reached")],
)
def test_how_a_server_stands_that_is_waited_for(said, server_state, answers, words):
    ready = False

    def handler(request):
        if ready and request.url.path == "/ready":
            return httpx.Response(200)
        if ready:
            return httpx.Response(200, json=server_state.model_dump(mode="json"))
        if answers is None:
            raise httpx.ConnectError("Connection refused")
        return httpx.Response(answers)

    # The first mention comes before the first answer; the one that tells how it stands ends the wait.
    first = True

    def look(request):
        nonlocal first, ready
        if not first and not ready:
            while words not in said.get():
                pass
            ready = True
        first = False
        return handler(request)

    client = RolloutClient("http://server", transport=httpx.MockTransport(look))
    assert client.wait_ready(60, poll_s=0.0).model == server_state.model


def test_a_lost_server_is_waited_for_aloud(said, client, server_state):
    pool = ServerPool(lambda url: client, ServerDiscovery(["http://fake"]), patience_s=60.0)
    replica = Replica(client, server_state)
    pool.replicas["http://fake"] = replica
    pool._recover = lambda replica: None
    pool.lost(replica, NotReady("it is away"))

    def come_back():
        mention = said.get()
        pool.mark_up(replica)
        return mention

    mention = start(come_back, "comes back")
    assert pool.available() == [replica]
    assert "a rollout server (http://fake: it is away [not_ready]): 0 s of at most 60 s, then" in mention.result()
    assert "the steps so far are saved, and the same command goes on" in mention.result()


def test_a_training_that_is_asked_to_end_waits_for_no_server(client, server_state):
    pool = ServerPool(lambda url: client, ServerDiscovery(["http://fake"]), patience_s=3600.0)
    pool.replicas["http://fake"] = replica = Replica(client, server_state)
    pool._recover = lambda replica: None
    pool.lost(replica, NotReady("it is away"))
    pool.leaving = "SIGTERM has come"
    with pytest.raises(NotReady, match="SIGTERM has come while no rollout server is up"):
        pool.available()
