"""Work that must not end half-way, because what it writes is served."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end, also when the caller is cancelled meanwhile; its next `await` is cancelled instead."""
    task = asyncio.ensure_future(work)
    caller, cancelled = asyncio.current_task(), 0
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled += 1
    if caller is not None:
        for _ in range(cancelled):
            caller.uncancel()
        if cancelled:
            caller.cancel()
    return task.result()
