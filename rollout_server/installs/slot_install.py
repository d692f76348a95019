"""Install of an adapter in a slot: fill it while decoding goes on, then flip to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rollout_server.engine.admission import KV
from rollout_server.installs.context import InstallContext
from rollout_server.ipc.client import WorkerCall
from rollout_server.runs.slots import Run, Slot
from shared.adapter_file import AdapterHeader
from shared.errors import EngineDead, InstallFailed, UnknownRun
from shared.weights import InFlight, PushReceipt

_SWAP_SECONDS = 10.0


@dataclass
class SlotInstall:
    """One adapter on its way into a slot, with the seconds of each phase."""

    context: InstallContext
    run: Run
    header: AdapterHeader
    deadline: float
    in_flight: InFlight
    transport: Literal["http", "collective"]
    sent_seconds: float = 0.0
    _wait_seconds: float = field(default=0.0, init=False)
    _slot: Slot | None = field(default=None, init=False)
    _call: WorkerCall = field(init=False)

    @property
    def kv(self) -> KV:
        """KV of requests that move to the new version."""
        return "carried" if self.in_flight == "carried" else "fresh"

    @contextlib.asynccontextmanager
    async def filling(self, source: dict[str, Any]) -> AsyncIterator[None]:
        """Let all workers receive and write from `source` into a free slot.

        Unless `finish` is reached, the slot is released and nothing has changed.
        """
        started = time.monotonic()
        slot = await self.run.reserve(self.deadline)
        self._wait_seconds = time.monotonic() - started
        async with self.context.fill_lock:
            try:
                self._begin_fill(slot.slot_id, source)
                self._slot = slot
                yield
            finally:
                if self._slot is not None:
                    self._recover(slot)

    def _begin_fill(self, slot_id: int, source: dict[str, Any]) -> None:
        key, checksum = self.header.layout.key, self.header.manifest.checksum
        self._call = self.context.workers.begin("fill", slot_id=slot_id, key=key, checksum=checksum, source=source)

    async def acknowledged(self) -> None:
        """Wait until every worker receives."""
        await self._call.acknowledged(self._left())

    async def finish(self) -> PushReceipt:
        """Wait for every worker's result and flip."""
        context, run, manifest = self.context, self.run, self.header.manifest
        results = await self._call.results(self._left())
        written = time.monotonic()
        if run.closed:
            raise UnknownRun(f"run {run.run_id} was deleted while a push was under way")
        install_seq = context.runs.next_install_seq()
        waited = self._wait_seconds
        pause_seconds = await self._switch(install_seq)
        receipt = PushReceipt(
            epoch=context.boot_id,
            version=manifest.version,
            install_seq=install_seq,
            checksum=manifest.checksum,
            bytes=self.header.total_bytes,
            transport=self.transport,
            workers=len(results),
            modules=results[0]["modules"],
            transfer_seconds=self.sent_seconds + max(result["receive_seconds"] for result in results),
            wait_seconds=self._wait_seconds,
            install_seconds=max(result["write_seconds"] for result in results),
            flip_seconds=time.monotonic() - written - (self._wait_seconds - waited),
            pause_seconds=pause_seconds,
        )
        run.header = self.header
        context.remember(receipt)
        return receipt

    async def _switch(self, install_seq: int) -> float:
        """Let requests sample from the verified adapter; return the seconds for which none was decoding."""
        run, slot, manifest = self.run, self._slot, self.header.manifest
        assert slot
        if self.in_flight != "drain" and run.active is not None and run.active.requests > 0:
            return await self._move(run, run.active, slot, install_seq)
        self._slot = None
        run.flip(slot, manifest.version, install_seq, manifest.checksum)
        return 0.0

    async def _move(self, run: Run, active: Slot, spare: Slot, install_seq: int) -> float:
        """Move running requests to the new adapter: swap the two slots while the engine is paused.

        Returns the seconds of the pause.
        """
        proxy, manifest = self.context.proxy, self.header.manifest
        started = time.monotonic()
        run.not_moving.clear()
        try:
            async with asyncio.timeout(self._left()), proxy.paused(clear_cache=self.kv == "fresh") as tokens:
                try:
                    await self.context.workers.call("swap", _SWAP_SECONDS, one=active.slot_id, other=spare.slot_id)
                except BaseException:
                    proxy.give_up(EngineDead("not every worker exchanged its adapter slots"))
                    raise
                self._slot = None
                run.move(manifest.version, install_seq, manifest.checksum, tokens, self.kv)
                run.give_back(spare)
        except TimeoutError:
            raise InstallFailed("the engine did not pause before the push's deadline") from None
        finally:
            run.not_moving.set()
        return time.monotonic() - started

    def _left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def _recover(self, slot: Slot) -> None:
        """Release the slot as soon as no worker writes it."""
        call, run, recoveries = self._call, self.run, self.context.recoveries
        run.give_back(slot, lost=True)

        async def recover() -> None:
            await call.ended()
            run.give_back(slot)

        task = asyncio.get_running_loop().create_task(recover())
        recoveries.add(task)
        task.add_done_callback(recoveries.discard)
