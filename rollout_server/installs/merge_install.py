"""One adapter on its way into the live weights, for `--apply merge`: received while decoding goes on, then merged."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from rollout_server.engine.admission import KV
from rollout_server.installs.slot_install import SlotInstall


class MergeInstall(SlotInstall):
    """Fills no slot: the workers receive and verify, and change the weights when nothing computes with them."""

    @contextlib.asynccontextmanager
    async def filling(self, source: dict[str, Any]) -> AsyncIterator[None]:
        """Let all workers receive and verify from `source`. Unless `finish` is reached, nothing has changed."""
        async with self._installer.fill_lock:
            self._call = self._installer.workers.begin(
                "fill", slot_id=0, key=self._header.layout.key, checksum=self._header.manifest.checksum, **source
            )
            yield

    async def _switch(self, install_seq: int) -> float:
        run, version, checksum = self._run, self._header.manifest.version, self._header.manifest.checksum
        kv: KV | None = None
        if self._in_flight != "drain" and run.active is not None:  # before the first push it is the base that runs
            kv = "carried" if self._in_flight == "carried" else "fresh"
        async with self._installer.weights.changed(run, checksum, self._deadline, kv) as change:
            if kv is None:
                await run.flip(run.slots[0], version, install_seq, checksum)
            else:
                await run.move_to(
                    None, version, install_seq, checksum, lambda admission: admission.move(change.tokens, version, kv)
                )
        self._wait_seconds += change.wait_seconds
        return change.pause_seconds
