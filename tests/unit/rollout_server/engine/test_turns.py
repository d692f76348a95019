"""Long work lets others have their turns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from rollout_server.engine import turns
from rollout_server.engine.turns import in_turn, in_turns


async def test_others_have_their_turns_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_TURN_SECONDS", 0.0)
    began, asked, order = threading.Event(), threading.Event(), list[str]()

    def long() -> Iterator[int]:
        for item in range(3):
            began.set()
            assert asked.wait(20)
            order.append(f"long {item}")
            yield item

    making = asyncio.ensure_future(in_turns(long()))
    await asyncio.to_thread(began.wait, 20)
    other = asyncio.ensure_future(in_turn(order.append, "other"))
    await asyncio.sleep(0)
    asked.set()
    await other
    assert await making == [0, 1, 2]
    assert order == ["long 0", "other", "long 1", "long 2"]


async def test_short_work_takes_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_TURN_SECONDS", 1e9)
    taken: list[int] = []
    go_on = turns._go_on
    monkeypatch.setattr(turns, "_go_on", lambda left, done: taken.append(1) or go_on(left, done))
    assert await in_turns(range(1000)) == list(range(1000))
    assert len(taken) == 1


async def test_an_error_ends_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        await in_turns(failing())
