"""When an engine counts as hanging."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rollout_server.engine.watchdog import StallWatchdog


class _Proxy:
    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], int] = {}
        self.outputs = self.held = self.probes = 0
        self.reasons: list[str] = []
        self.answers = False  # to a probe

    def output_tokens(self) -> dict[tuple[str, int], int]:
        return dict(self.tokens)

    def probe(self, *, sampling: bool) -> None:
        self.sampling = sampling
        self.probes += 1
        if self.answers:
            self.outputs += 1

    def give_up(self, reason: Exception) -> None:
        self.reasons.append(str(reason))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock, proxy = SimpleNamespace(now=1000.0), _Proxy()
    monkeypatch.setattr("rollout_server.engine.watchdog.time.monotonic", lambda: clock.now)
    stall = StallWatchdog(proxy, 30.0)

    def wait(seconds: float, each=lambda: None) -> None:
        for _ in range(round(seconds)):
            clock.now += 1
            each()
            stall.look()

    return SimpleNamespace(clock=clock, proxy=proxy, stall=stall, wait=wait)


def test_no_token_of_any_request(watched) -> None:
    watched.proxy.tokens = {("a", 0): 5, ("a", 1): 9}
    watched.wait(20)
    watched.proxy.tokens["a", 1] += 1
    watched.wait(30)
    assert not watched.proxy.reasons
    watched.wait(5)
    assert "2 sequences" in watched.proxy.reasons[0]
    assert "--engine-stall-seconds" in watched.proxy.reasons[0]


def test_idle_held_and_finishing_engines_are_well(watched) -> None:
    watched.wait(100)
    watched.proxy.tokens, watched.proxy.held = {("a", 0): 5}, 1
    watched.wait(100)
    watched.proxy.held = 0

    def one_more() -> None:
        watched.proxy.outputs += 1

    watched.wait(100, one_more)
    assert not watched.proxy.reasons


@pytest.mark.parametrize("sampling", [True, False])
def test_how_it_asks(watched, sampling: bool) -> None:
    watched.stall._sampling = sampling
    watched.proxy.tokens = {("compiling", 0): 0}
    watched.wait(20)
    assert watched.proxy.sampling is sampling


def test_a_request_that_cannot_begin_is_no_hang_while_others_could(watched) -> None:
    """A grammar that is being compiled, on a server that has nothing else to do."""
    watched.proxy.tokens, watched.proxy.answers = {("compiling", 0): 0}, True
    watched.wait(100)
    assert not watched.proxy.reasons
    assert 3 <= watched.proxy.probes <= 7, "a probe in each half of the limit"
    watched.proxy.answers = False
    watched.wait(40)
    assert watched.proxy.reasons


def test_requests_that_come_and_go_are_no_progress(watched) -> None:
    def come_and_go() -> None:
        watched.proxy.tokens = {(f"request-{watched.clock.now}", 0): 0}

    watched.wait(35, come_and_go)
    assert watched.proxy.reasons


def test_the_time_before_a_request_came_does_not_count(watched) -> None:
    watched.wait(3)
    watched.clock.now += 4
    watched.proxy.tokens = {("a", 0): 0}
    watched.stall.look()
    watched.wait(30)
    assert not watched.proxy.reasons
    watched.wait(2)
    assert watched.proxy.reasons


def test_a_server_that_was_stopped_itself_blames_nobody(watched) -> None:
    watched.proxy.tokens = {("a", 0): 5}
    watched.wait(3)
    watched.clock.now += 3600
    watched.stall.look()
    assert not watched.proxy.reasons


def test_zero_is_never() -> None:
    proxy = _Proxy()
    proxy.tokens = {("a", 0): 0}
    stall = StallWatchdog(proxy, 0.0)
    stall._looked -= 10_000
    stall.look()
    assert not proxy.reasons
    assert not stall._tokens
