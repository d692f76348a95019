"""Pool of servers that come, fail, hang and return; router of prompts; discovery."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from learner.rollouts.completions import AllowedVersion
from learner.rollouts.dispatch import Dispatcher, group_requests
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.servers.replica import Load, Replica
from learner.servers.router import Router
from shared.errors import InvalidRequest, LeaseMismatch, LockstepError, NotReady, Timeout, UnknownRun
from shared.sampling import SamplingParams
from tests.unit.learner.rollouts.test_generation import VERSION
from tests.unit.learner.rollouts.test_generation import Server as Answers


class Server(Answers):
    """Takes `seconds` for each group; raises from the completion with number `broken` on."""

    def __init__(self, url: str, seconds: float = 0.0) -> None:
        super().__init__(url)
        self.seconds, self.broken, self.completed, self.draining = seconds, None, 0, False

    def wait_ready(self, timeout_s):
        return self.state()

    def state(self, timeout_s=1.0):
        if self.broken is not None:
            raise NotReady(f"{self.url} is away")
        return SimpleNamespace(
            epoch="e", runs=[], draining=self.draining, max_body_bytes=2**20, max_image_memory=0, least_image_memory=0
        )

    def iter_groups(self, request):
        for group in super().iter_groups(request):
            time.sleep(self.seconds)
            if self.broken is not None and self.completed >= self.broken:
                raise NotReady(f"{self.url} is away")
            self.completed += len(group.completions)
            yield group


@pytest.fixture
def pool_of():
    """Builds a pool of servers, supervised by a `recover` that only checks whether they answer."""
    pools = []

    def make(*servers: Server, supervised: bool = True, patience_s: float = 10.0) -> ServerPool:
        by_url = {server.url: server for server in servers}
        pool = ServerPool(by_url.__getitem__, ServerDiscovery(list(by_url)), patience_s=patience_s)
        pools.append(pool)
        pool.wait_ready(1.0)

        def recover(replica: Replica) -> None:
            replica.state = replica.client.state()
            pool.mark_up(replica)

        if supervised:
            pool.supervise(recover)
        return pool

    yield make
    for pool in pools:
        pool.close()


def fetch(pool: ServerPool, prompts: list[list[int]], arrived=None):
    dispatcher = Dispatcher(pool, SamplingParams(max_tokens=10), max_model_len=50)
    return [c.token_ids for c in dispatcher.dispatch(group_requests(prompts), lambda: AllowedVersion(VERSION), arrived)]


PROMPTS = [[i] for i in range(1, 13) for _ in range(2)]
EXPECTED = [[100 * i + k] for i in range(1, 13) for k in range(2)]


def test_prompts_are_spread_and_come_back_in_order(pool_of):
    servers = [Server(f"http://s{i}", 0.001) for i in range(3)]
    assert fetch(pool_of(*servers), PROMPTS) == EXPECTED
    assert [server.completed for server in servers] == [8, 8, 8]


def test_a_dead_server_costs_only_what_it_had_not_sent(pool_of):
    dead, alive = Server("http://dead", 0.01), Server("http://alive", 0.01)
    pool, seen = pool_of(dead, alive), Counter()
    dead.broken = 4
    assert fetch(pool, PROMPTS, lambda row, completions: seen.update([row])) == EXPECTED
    assert set(seen.values()) == {1}, "every group arrives once"
    assert len(seen) == 12, "every group arrives once"
    assert dead.completed == 4
    assert alive.completed == 20
    assert [replica.url for replica in pool.up()] == ["http://alive"]


def test_a_recovered_server_gets_requests_again(pool_of):
    server = Server("http://s")
    pool = pool_of(server)
    server.broken = 6
    mended = threading.Timer(0.5, lambda: setattr(server, "broken", None))
    mended.start()
    assert fetch(pool, PROMPTS) == EXPECTED
    assert server.completed == 24
    assert pool.replicas["http://s"].incarnation == 2


def test_patience_ends(pool_of):
    server = Server("http://s")
    pool = pool_of(server, patience_s=0.3)
    server.broken = 0
    with pytest.raises(LockstepError, match="is away"):
        fetch(pool, PROMPTS)


def test_a_run_held_by_another_learner_is_an_error_at_once(pool_of):
    pool = pool_of(Server("http://s"), supervised=False, patience_s=60.0)

    def refuse(replica):
        raise LeaseMismatch("another learner holds it")

    pool.supervise(refuse)
    pool.lost(pool.up()[0], UnknownRun("gone"))
    with pytest.raises(LockstepError, match="another learner"):
        pool.available()


def test_a_permanent_refusal_is_raised(pool_of):
    pool = pool_of(Server("http://s"))
    with pytest.raises(LockstepError, match="bad"):
        pool.lost_or_raise(pool.up()[0], InvalidRequest("bad"), 1)


def test_a_stale_failure_does_not_mark_a_recovered_server_as_lost(pool_of):
    pool = pool_of(Server("http://s"))
    replica = pool.up()[0]
    pool.lost(replica, NotReady("old"), incarnation=replica.incarnation - 1)
    assert replica.up


def test_a_hanging_server_is_lost(pool_of, monkeypatch):
    monkeypatch.setattr("learner.servers.pool._WATCH_S", 0.02)
    server = Server("http://s")
    pool = pool_of(server, Server("http://t"), supervised=False)

    def hang(timeout_s=1.0):
        raise Timeout("no answer")

    server.state = hang
    pool.supervise(lambda replica: hang())
    replica = pool.replicas["http://s"]
    deadline = time.monotonic() + 20
    while replica.up and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not replica.up
    assert pool.replicas["http://t"].up


def test_a_draining_server_gets_no_more_requests(pool_of, monkeypatch):
    monkeypatch.setattr("learner.servers.pool._WATCH_S", 0.02)
    leaving = Server("http://s")
    pool = pool_of(leaving, Server("http://t"), supervised=False)
    leaving.draining = True
    pool.supervise(lambda replica: None)
    deadline = time.monotonic() + 20
    while len(pool.up()) == 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [replica.url for replica in pool.up()] == ["http://t"]


def test_servers_listed_in_a_file_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr("learner.servers.pool._DISCOVER_S", 0.05)
    listed = tmp_path / "servers"
    listed.write_text("http://a:1 # the first\n\n")
    servers = {url: Server(url) for url in ("http://a:1", "http://b:1")}
    pool = ServerPool(servers.__getitem__, ServerDiscovery([f"file:{listed}"]))
    pool.wait_ready(1.0)
    pool.supervise(lambda replica: pool.mark_up(replica))

    def until(urls):
        deadline = time.monotonic() + 20
        while [m.url for m in pool.up()] != urls and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [m.url for m in pool.up()] == urls

    listed.write_text("http://a:1\nhttp://b:1\n")
    until(["http://a:1", "http://b:1"])
    listed.write_text("http://b:1\n")
    until(["http://b:1"])
    listed.write_text("")  # a file that is just being written: no server is forgotten
    time.sleep(0.2)
    until(["http://b:1"])
    pool.close()


def test_a_supervisor_survives_any_error(pool_of):
    server = Server("http://s")
    pool = pool_of(server, supervised=False)
    replica = pool.up()[0]
    for _ in range(2000):
        replica.back_off(refused=False)
    replica.retry_at, tries = 0.0, []

    def recover(replica):
        tries.append(1)
        if len(tries) < 3:
            replica.retry_at = 0.0
            raise RuntimeError("out of memory")
        pool.mark_up(replica)

    replica.failures = 0
    pool.supervise(recover)
    pool.lost(replica, NotReady("gone"))
    replica.back_off = lambda *, refused: None
    assert pool.available() == [replica]
    assert len(tries) == 3


def test_lines_that_are_no_urls_change_nothing(tmp_path, caplog):
    listed = tmp_path / "servers"
    listed.write_text("http://a:1\n")
    discovery = ServerDiscovery([f"file:{listed}", "http://b:1"])
    for content in (b"http://a:80o0\n", b"\xff\xfe\n", b"", b"http://a:1\nrubbish\n"):
        assert discovery.urls() == ["http://a:1", "http://b:1"]
        listed.write_bytes(content)
        caplog.clear()
        if content:
            assert discovery.urls() == ["http://a:1", "http://b:1"]
            assert "stay as they were" in caplog.text


@pytest.mark.parametrize(
    "source",
    ["dns+http://x:99999", "http://h:80o0", "localhost:8000", "ftp://x", "dns+https://x:1", "file:/nowhere/at/all"],
)
def test_impossible_sources_are_refused(source):
    with pytest.raises(LockstepError, match="rollout_url"):
        ServerDiscovery([source])


def test_a_name_stands_for_its_addresses():
    assert set(ServerDiscovery(["dns+http://localhost:81"]).urls()) <= {"http://127.0.0.1:81", "http://[::1]:81"}
    assert ServerDiscovery(["http://a:1/", "http://a:1"]).urls() == ["http://a:1"]


def _server(url, speed=None, outstanding=0.0):
    load = Load()
    load.speed, load.outstanding = speed, outstanding
    return SimpleNamespace(url=url, load=load)


def _shares(router, asks, servers):
    return {server.url: len(share) for server, share in router.split(asks, servers)}


def test_slow_and_busy_servers_get_less():
    asks = group_requests([[i] for i in range(30)])
    assert _shares(Router(100), asks, [_server("a", 200.0), _server("b", 100.0)]) == {"a": 20, "b": 10}
    assert _shares(Router(100), asks, [_server("a"), _server("b", outstanding=1010.0)]) == {"a": 20, "b": 10}
    assert _shares(Router(100), asks[:2], [_server("a"), _server("b", outstanding=1e6)]) == {"a": 2}


def test_prompts_go_where_their_beginning_is_known():
    router, servers = Router(10), [_server("a"), _server("b")]
    histories = [list(range(start, start + 300)) for start in (0, 1000, 2000, 3000)]
    first = {
        tuple(ask.token_ids): s.url for s, share in router.split(group_requests(histories), servers) for ask in share
    }
    longer = [[*history, 7, 8, 9] for history in histories]
    again = {
        tuple(ask.token_ids[:300]): s.url for s, share in router.split(group_requests(longer), servers) for ask in share
    }
    assert again == first
    assert set(first.values()) == {"a", "b"}
    servers[0].load.outstanding = 1e5
    assert {s.url for s, _ in router.split(group_requests(longer), servers)} == {"b"}, "unless it is busy"


def test_speed_is_measured_while_busy():
    load = Load()
    load.begin(100.0)
    time.sleep(0.1)
    load.end(100.0, 500)
    assert load.outstanding == 0
    assert 500 < load.speed < 5100


def _supervised(pool_of, monkeypatch, count, checks):
    """Return a supervised pool of servers that have been silent, the last ones longest, and whom it asks at first."""
    monkeypatch.setattr("learner.servers.pool._CHECKS", checks)
    monkeypatch.setattr("learner.servers.pool._LOOK_S", 3600.0)  # it looks once
    servers = [Server(f"http://s{i}") for i in range(count)]
    pool, asked, enough = pool_of(*servers, supervised=False), [], threading.Event()
    for i, server in enumerate(servers):
        pool.replicas[server.url].heard_at = -1e6 - i

        def state(timeout_s=1.0, server=server):
            asked.append(server.url)
            if len(asked) >= checks:
                enough.set()
            return SimpleNamespace(
                epoch="e", runs=[], draining=False, max_body_bytes=2**20, max_image_memory=0, least_image_memory=0
            )

        server.state = state
    return pool, asked, enough


def test_of_many_servers_a_few_are_asked_at_a_time_the_longest_silent_first(pool_of, monkeypatch):
    pool, asked, enough = _supervised(pool_of, monkeypatch, 100, 5)
    before = threading.enumerate()
    pool.supervise(lambda replica: None)
    assert enough.wait(60)
    deadline = time.monotonic() + 60
    while any(replica.attended for replica in pool.replicas.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(asked) == [f"http://s{i}" for i in range(95, 100)]
    begun = [thread.name for thread in threading.enumerate() if thread not in before]
    assert [name for name in begun if "supervise" in name] == ["lockstep-supervise"]


def test_a_server_that_has_just_answered_is_not_asked(pool_of, monkeypatch):
    pool, asked, enough = _supervised(pool_of, monkeypatch, 3, 2)
    pool.replicas["http://s1"].heard()
    pool.supervise(lambda replica: None)
    assert enough.wait(60)
    assert sorted(asked) == ["http://s0", "http://s2"]


def test_completions_are_a_sign_of_life(pool_of):
    pool = pool_of(Server("http://s"), supervised=False)
    pool.replicas["http://s"].heard_at = -1e6
    fetch(pool, PROMPTS)
    assert pool.replicas["http://s"].heard_at > 0


def test_a_lost_server_is_tried_again_while_another_one_hangs(pool_of):
    pool, hanging, back = pool_of(Server("http://s"), Server("http://t"), supervised=False), threading.Event(), []

    def recover(replica):
        if replica.url == "http://s":
            hanging.wait(60)
        back.append(replica.url)
        pool.mark_up(replica)

    pool.supervise(recover)
    for replica in pool.up():
        pool.lost(replica, NotReady("gone"))
    assert [replica.url for replica in pool.available()] == ["http://t"]
    hanging.set()
    assert back[0] == "http://t"


def test_a_server_that_is_being_pushed_to_is_not_asked(pool_of, monkeypatch):
    pool, asked, enough = _supervised(pool_of, monkeypatch, 3, 2)
    pool.replicas["http://s2"].pushing = True
    pool.supervise(lambda replica: None)
    assert enough.wait(60)
    assert sorted(asked) == ["http://s0", "http://s1"]


def test_the_usual_limit_on_descriptors_does_not_bound_the_servers(pool_of):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    usual = min(1024, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual, hard))
    try:
        pool_of(Server("http://s"), supervised=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (min(2**16, hard) if hard > 0 else 2**16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
