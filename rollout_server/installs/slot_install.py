"""Install of an adapter in a slot: fill it while decoding goes on, then flip to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rollout_server.engine.admission import KV, OutputTokens
from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.uninterrupted import uninterrupted
from rollout_server.ipc.client import WorkerCall, Workers
from rollout_server.ipc.memory import SharedMemory
from rollout_server.runs.slots import Run, Slot
from rollout_server.runs.table import RunTable
from shared.adapter_file import AdapterHeader
from shared.errors import EngineDead, InstallFailed
from shared.weights import InFlight, PushReceipt

_SWAP_SECONDS = 10.0
#: `group` and `timeout` of a broadcast, or memory in which the adapter lies.
Source = dict[str, Any] | SharedMemory


@dataclass
class InstallContext:
    """State that all installs of this server share."""

    proxy: EngineProxy
    workers: Workers
    runs: RunTable
    boot_id: str
    recoveries: set[asyncio.Future[None]] = field(default_factory=set)
    fill_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # the workers have one receive buffer each


@dataclass
class SlotInstall:
    """One adapter on its way into a slot, with the seconds of each phase."""

    context: InstallContext
    run: Run
    lease: str
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
    async def filling(self, source: Source) -> AsyncIterator[None]:
        """Let all workers receive and write from `source` into a free slot.

        Unless `finish` is reached, the slot is released and nothing has changed.
        """
        started, begun = time.monotonic(), False
        slot = self._slot = await self.run.reserve(self.deadline, self.header.manifest.version.fence)
        self._wait_seconds = time.monotonic() - started
        try:
            async with self.context.fill_lock:
                await self._begin_fill(slot.slot_id, source)
                begun = True
                yield
        finally:
            if not begun or (self._slot is not None and self._call.done):
                self.run.give_back(slot)
            elif self._slot is not None:  # a worker may still be writing it
                self.run.give_back(slot, lost=True)
                recovery = asyncio.ensure_future(self._call.ended())
                self.context.recoveries.add(recovery)
                recovery.add_done_callback(self.context.recoveries.discard)
                recovery.add_done_callback(lambda _: self.run.give_back(slot))

    async def _begin_fill(self, slot_id: int, source: Source) -> None:
        workers, header = self.context.workers, self.header
        if isinstance(source, SharedMemory):
            started = time.monotonic()
            found = await workers.readable(source, header.total_bytes, self._left())
            self.sent_seconds += time.monotonic() - started
            sources = [{"path": path, "memory": memory, "offset": header.data_offset} for path, memory in found]
        else:
            sources = [source] * len(workers)
        common = {"slot_id": slot_id, "key": header.layout.key, "checksum": header.manifest.checksum}
        self._call = workers.begin_each("fill", [{**common, "source": source} for source in sources])

    async def acknowledged(self) -> None:
        """Wait until every worker receives."""
        await self._call.acknowledged(self._left())

    async def finish(self) -> PushReceipt:
        """Wait for every worker's result and flip."""
        results = await self._call.results(self._left())
        written, waited, manifest = time.monotonic(), self._wait_seconds, self.header.manifest
        receipt = PushReceipt(
            epoch=self.context.boot_id,
            version=manifest.version,
            install_seq=self.context.runs.next_install_seq(),
            checksum=manifest.checksum,
            bytes=self.header.total_bytes,
            transport=self.transport,
            workers=len(results),
            modules=results[0]["modules"],
            transfer_seconds=self.sent_seconds + max(result["receive_seconds"] for result in results),
            wait_seconds=waited,
            install_seconds=max(result["write_seconds"] for result in results),
            flip_seconds=0.0,
        )
        pause_seconds = await self._switch(receipt)
        # What is served has this receipt already; from now on with its times.
        receipt.wait_seconds, receipt.pause_seconds = self._wait_seconds, pause_seconds
        receipt.flip_seconds = time.monotonic() - written - (self._wait_seconds - waited)
        return receipt

    def _serve(self, receipt: PushReceipt, slot: Slot, tokens: OutputTokens | None = None) -> None:
        """Give `slot` to new requests, and to running ones that have `tokens` so far; the run to its learner."""
        run, version = self.run, receipt.version
        self.context.runs.own(run, self.lease)
        run.recall(version.fence)
        if tokens is None:
            run.flip(slot, version, receipt.install_seq, receipt.checksum)
        else:
            run.move(version, receipt.install_seq, receipt.checksum, tokens, self.kv)
        slot.receipt, run.header = receipt, self.header

    async def _switch(self, receipt: PushReceipt) -> float:
        """Let requests sample from the verified adapter; return the seconds for which none was decoding."""
        run, active, spare = self.run, self.run.active, self._slot
        assert spare
        if self.in_flight == "drain" or active is None or not active.held:
            self._slot = None
            self._serve(receipt, spare)
            return 0.0
        # Running requests move along: the two slots are swapped while the engine is paused.
        started = time.monotonic()
        run.not_moving.clear()
        try:
            async with (
                asyncio.timeout(self._left()) as limit,
                self.context.proxy.paused(clear_cache=self.kv == "fresh") as tokens,
            ):
                limit.reschedule(None)  # the engine is paused for as long as the swap takes
                await uninterrupted(self._swap(receipt, active, spare, tokens))
        except TimeoutError:
            raise InstallFailed("the engine did not pause before the push's deadline") from None
        finally:
            run.not_moving.set()
        return time.monotonic() - started

    async def _swap(self, receipt: PushReceipt, active: Slot, spare: Slot, tokens: OutputTokens) -> None:
        try:
            await self.context.workers.call("swap", timeout=_SWAP_SECONDS, one=active.slot_id, other=spare.slot_id)
        except BaseException:
            self.context.proxy.give_up(EngineDead("not every worker exchanged its adapter slots"))
            raise
        self._slot = None
        self._serve(receipt, active, tokens)
        self.run.give_back(spare)

    def _left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)
