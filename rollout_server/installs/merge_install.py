"""Install of an adapter in the live weights, for `--apply merge`: receive while decoding goes on, then merge."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from rollout_server.installs.slot_install import SlotInstall


class MergeInstall(SlotInstall):
    """Install without a slot: the workers receive and verify, then change the weights when no request uses them."""

    @contextlib.asynccontextmanager
    async def filling(self, source: dict[str, Any]) -> AsyncIterator[None]:
        """Let all workers receive and verify from `source`. Unless `finish` is reached, nothing has changed."""
        async with self.context.fill_lock:
            self._begin_fill(0, source)
            yield

    async def _switch(self, install_seq: int) -> float:
        run, version, checksum = self.run, self.header.manifest.version, self.header.manifest.checksum
        # Before the first push it is the base that runs.
        kv = self.kv if self.in_flight != "drain" and run.active is not None else None
        async with self.context.weights.updated(run, checksum, self.deadline, kv) as update:
            if kv is None:
                run.flip(run.slots[0], version, install_seq, checksum)
            else:
                run.move(version, install_seq, checksum, update.tokens, kv)
        self._wait_seconds += update.wait_seconds
        return update.pause_seconds
