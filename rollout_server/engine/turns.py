"""Work of the CPU beside the event loop, which must go on to answer: one piece at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_TURN_SECONDS = 0.05
#: One thread: pieces at once would only take the interpreter, and memory, from each other and from the event loop.
_thread = ThreadPoolExecutor(1, thread_name_prefix="lockstep-turns")


async def in_turn(work: Callable[..., T], *args: Any) -> T:
    """Run `work` on a thread of its own, after what others have asked for before."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work, *args)


async def in_turns(work: Iterable[T]) -> list[T]:
    """Return the items of `work`, which are made on that thread; others have their turns in between."""
    left, done = iter(work), list[T]()
    while await in_turn(_go_on, left, done):
        pass
    return done


def _go_on(left: Iterator[T], done: list[T]) -> bool:
    """Make items for as long as a turn takes; return whether there may be more."""
    end = time.monotonic() + _TURN_SECONDS
    for item in left:
        done.append(item)
        if time.monotonic() >= end:
            return True
    return False
