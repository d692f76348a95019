"""Work of the CPU beside the event loop, which must go on to answer: one piece at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

#: One thread: pieces at once would only take the interpreter, and memory, from each other and from the event loop.
_thread = ThreadPoolExecutor(1, thread_name_prefix="lockstep-turns")


async def in_turn(work: Callable[..., T], *args: Any) -> T:
    """Run `work` on a thread of its own, after what others have asked for before."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work, *args)
