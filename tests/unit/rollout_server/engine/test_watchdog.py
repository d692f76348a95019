"""When an engine counts as hanging."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rollout_server.engine.watchdog import Stall


class _Door:
    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], int] = {}
        self.outputs = self.held = 0
        self.reasons: list[str] = []

    def output_tokens(self) -> dict[tuple[str, int], int]:
        return dict(self.tokens)

    def give_up(self, reason: Exception) -> None:
        self.reasons.append(str(reason))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock, door = SimpleNamespace(now=1000.0), _Door()
    monkeypatch.setattr("rollout_server.engine.watchdog.time.monotonic", lambda: clock.now)
    stall = Stall(door, 30.0)

    def wait(seconds: float, each=lambda: None) -> None:
        for _ in range(round(seconds)):
            clock.now += 1
            each()
            stall.look()

    return SimpleNamespace(clock=clock, door=door, stall=stall, wait=wait)


def test_no_token_of_any_request(watched) -> None:
    watched.door.tokens = {("a", 0): 5, ("a", 1): 9}
    watched.wait(20)
    watched.door.tokens["a", 1] += 1
    watched.wait(30)
    assert not watched.door.reasons
    watched.wait(5)
    assert "2 sequences" in watched.door.reasons[0]
    assert "--engine-stall-seconds" in watched.door.reasons[0]


def test_idle_held_and_finishing_engines_are_well(watched) -> None:
    watched.wait(100)
    watched.door.tokens, watched.door.held = {("a", 0): 5}, 1
    watched.wait(100)
    watched.door.held = 0

    def one_more() -> None:
        watched.door.outputs += 1

    watched.wait(100, one_more)
    assert not watched.door.reasons


def test_requests_that_come_and_go_are_no_progress(watched) -> None:
    def come_and_go() -> None:
        watched.door.tokens = {(f"request-{watched.clock.now}", 0): 0}

    watched.wait(35, come_and_go)
    assert watched.door.reasons


def test_the_time_before_a_request_came_does_not_count(watched) -> None:
    watched.wait(3)
    watched.clock.now += 4
    watched.door.tokens = {("a", 0): 0}
    watched.stall.look()
    watched.wait(30)
    assert not watched.door.reasons
    watched.wait(2)
    assert watched.door.reasons


def test_a_server_that_was_stopped_itself_blames_nobody(watched) -> None:
    watched.door.tokens = {("a", 0): 5}
    watched.wait(3)
    watched.clock.now += 3600
    watched.stall.look()
    assert not watched.door.reasons


def test_zero_is_never() -> None:
    door = _Door()
    door.tokens = {("a", 0): 0}
    stall = Stall(door, 0.0)
    stall._looked -= 10_000
    stall.look()
    assert not door.reasons
    assert not stall._tokens
