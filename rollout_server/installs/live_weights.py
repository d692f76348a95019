"""Installs in the weights that all requests compute with, for `--apply merge`: wait or pause, apply, resume."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from rollout_server.engine.admission import KV
from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.uninterrupted import uninterrupted
from rollout_server.installs.slot_install import SlotInstall, Source
from rollout_server.ipc.client import Workers
from rollout_server.runs.slots import Run, loop_time
from shared.errors import EngineDead, InstallFailed, NoFreeSlot
from shared.rounding import Arrived
from shared.weights import PushReceipt

_APPLY_SECONDS = 60.0  # all of W0 may come from host memory


@dataclass
class WeightUpdate:
    """Cost of an update, and how much of it arrived; `tokens`: how many each output of each running request had."""

    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    wait_seconds: float = 0.0
    pause_seconds: float = 0.0
    arrived: Arrived = field(default_factory=Arrived)


@dataclass
class LiveWeights:
    """The weights of all workers."""

    proxy: EngineProxy
    workers: Workers

    async def update(
        self,
        run: Run,
        checksum: str | None,
        deadline: float,
        commit: Callable[[WeightUpdate], None],
        kv: KV | None = None,
    ) -> WeightUpdate:
        """Apply the adapter of that checksum (None: no adapter), and `commit` to it while the engine is paused.

        No request is admitted until the end, so requests admitted later see what `commit` sets. Once a weight may have
        changed, a caller that is cancelled does not end it.

        Args:
            kv: None: wait until no request runs. Otherwise running requests survive the update and recompute their KV
                (`fresh`) or keep it (`carried`).

        Raises:
            LockstepError: `no_free_slot`, `install_failed`, a worker's refusal; nothing has changed then.
        """
        update, started = WeightUpdate(), time.monotonic()
        run.ring.admits.clear()
        try:
            if kv is None:
                slot = run.slots[0]
                if not await run.ring.wait_for(lambda: slot.requests == 0, deadline):
                    raise NoFreeSlot(
                        f"{slot.requests} requests still ran at the deadline, and the weights may not change under "
                        "them; push with in_flight = keep, or start the server with a longer --push-timeout"
                    )
            paused = time.monotonic()
            update.wait_seconds = paused - started
            run.not_moving.clear()
            try:
                async with (
                    asyncio.timeout_at(loop_time(deadline)) as limit,
                    self.proxy.paused(clear_cache=kv == "fresh") as update.tokens,
                ):
                    limit.reschedule(None)
                    await uninterrupted(self._commit(checksum, run.slots[0].checksum or None, update, commit))
            except TimeoutError:
                raise InstallFailed("the engine did not pause before the push's deadline") from None
            finally:
                run.not_moving.set()
                update.pause_seconds = time.monotonic() - paused
        finally:
            run.ring.admits.set()
        return update

    async def _commit(
        self, checksum: str | None, before: str | None, update: WeightUpdate, commit: Callable[[WeightUpdate], None]
    ) -> None:
        update.arrived = await self._apply(checksum, before)
        commit(update)

    async def _apply(self, checksum: str | None, before: str | None) -> Arrived:
        """Apply on all workers, or, where one fails, `before` on all of them again. Return what arrived."""
        call = self.workers.begin("apply", checksum=checksum)
        try:
            results = await call.results(_APPLY_SECONDS)
            return functools.reduce(Arrived.plus, (Arrived(*result["arrived"]) for result in results))
        except BaseException:
            try:
                async with asyncio.timeout(_APPLY_SECONDS):
                    await call.ended()
                await self.workers.call("apply", _APPLY_SECONDS, checksum=before)
            except BaseException:
                self.proxy.give_up(EngineDead("not every worker holds the same weights"))
                raise
            raise


class MergeInstall(SlotInstall):
    """Install without a slot: the workers receive and verify, then change the weights when no request uses them."""

    @asynccontextmanager
    async def filling(self, source: Source) -> AsyncIterator[None]:
        """Let all workers receive and verify from `source`. Unless `finish` is reached, nothing has changed."""
        async with self.context.fill_lock:
            await self._begin_fill(0, source)
            yield

    async def _switch(self, receipt: PushReceipt) -> float:
        # Before the first push it is the base that runs, or a run whose place this one takes.
        kv = self.kv if self.in_flight != "drain" and self.run.active is not None else None

        def commit(update: WeightUpdate) -> None:
            self._serve(receipt, self.run.slots[0], update.tokens if kv else None)

        weights = LiveWeights(self.context.proxy, self.context.workers)
        update = await weights.update(self.run, self.header.manifest.checksum, self.deadline, commit, kv)
        self._wait_seconds += update.wait_seconds
        receipt.update_share, receipt.update_error = update.arrived.share, update.arrived.error
        return update.pause_seconds
