"""One adapter on its way into a slot: filled while decoding goes on, then flipped to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from rollout_server.engine.admission import KV
from rollout_server.ipc.client import Call
from rollout_server.runs.slots import Run, Slot
from shared.adapter_file import AdapterHeader
from shared.errors import EngineDead, InstallFailed, UnknownRun
from shared.weights import InFlight, PushReceipt

if TYPE_CHECKING:
    from rollout_server.installs.installer import Installer

_SWAP_SECONDS = 10.0


class SlotInstall:
    """One adapter on its way into a slot, and the seconds that each part takes."""

    def __init__(
        self,
        installer: Installer,
        run: Run,
        header: AdapterHeader,
        deadline: float,
        in_flight: InFlight,
        transport: str,
        sent_seconds: float = 0.0,
    ) -> None:
        self._installer, self._run, self._header, self._deadline = installer, run, header, deadline
        self._in_flight, self._transport, self._sent_seconds = in_flight, transport, sent_seconds
        self._wait_seconds = 0.0
        self._slot: Slot | None = None
        self._call: Call | None = None

    @contextlib.asynccontextmanager
    async def filling(self, source: dict[str, Any]) -> AsyncIterator[None]:
        """Let all workers receive and write from `source` into a free slot. Unless `finish` is reached, the slot is
        given back and nothing has changed.
        """
        started = time.monotonic()
        slot = await self._run.reserve(self._deadline)
        self._wait_seconds = time.monotonic() - started
        async with self._installer.fill_lock:
            try:
                self._call = self._installer.workers.begin(
                    "fill",
                    slot_id=slot.slot_id,
                    key=self._header.layout.key,
                    checksum=self._header.manifest.checksum,
                    **source,
                )
                self._slot = slot
                yield
            finally:
                if self._slot is not None:
                    await asyncio.shield(self._recover(slot))

    async def told(self) -> None:
        """Wait until every worker receives."""
        assert self._call
        await self._call.told(self._left())

    async def finish(self) -> PushReceipt:
        """Wait for every worker's acknowledgement and flip."""
        assert self._call
        installer, run, manifest = self._installer, self._run, self._header.manifest
        answers = await self._call.answers(self._left())
        written = time.monotonic()
        if run.closed:
            raise UnknownRun(f"run {run.run_id} was deleted while a push was under way")
        install_seq = installer.runs.next_install_seq()
        waited = self._wait_seconds
        pause_seconds = await self._switch(install_seq)
        receipt = PushReceipt(
            epoch=installer.epoch,
            version=manifest.version,
            install_seq=install_seq,
            checksum=manifest.checksum,
            bytes=self._header.total_bytes,
            transport=self._transport,
            workers=len(answers),
            modules=answers[0]["modules"],
            transfer_seconds=self._sent_seconds + max(answer["receive_seconds"] for answer in answers),
            wait_seconds=self._wait_seconds,
            install_seconds=max(answer["write_seconds"] for answer in answers),
            flip_seconds=time.monotonic() - written - (self._wait_seconds - waited),
            pause_seconds=pause_seconds,
        )
        run.header = self._header
        installer.remember(receipt)
        return receipt

    async def _switch(self, install_seq: int) -> float:
        """Let requests sample from what the workers have acknowledged; the seconds for which none was decoding."""
        run, slot, manifest = self._run, self._slot, self._header.manifest
        assert slot
        if self._in_flight != "drain" and run.active is not None and run.active.requests > 0:
            return await self._move(run, run.active, slot, install_seq)
        self._slot = None
        await run.flip(slot, manifest.version, install_seq, manifest.checksum)
        return 0.0

    async def _move(self, run: Run, active: Slot, spare: Slot, install_seq: int) -> float:
        """Let running requests go on with the new adapter: the two slots change places while the engine is paused.

        Answers the seconds of the pause.
        """
        proxy, manifest = self._installer.proxy, self._header.manifest
        kv: KV = "carried" if self._in_flight == "carried" else "fresh"
        started = time.monotonic()
        run.not_moving.clear()
        try:
            async with asyncio.timeout(self._left()), proxy.paused(clear_cache=kv == "fresh") as tokens:
                try:
                    await self._installer.workers.call("swap", _SWAP_SECONDS, one=active.slot_id, other=spare.slot_id)
                except BaseException:
                    proxy.give_up(EngineDead("not every worker exchanged its adapter slots"))
                    raise
                self._slot = None
                await run.move_to(
                    spare,
                    manifest.version,
                    install_seq,
                    manifest.checksum,
                    lambda admission: admission.move(tokens, manifest.version, kv),
                )
        except TimeoutError:
            raise InstallFailed("the engine did not pause before the push's deadline") from None
        finally:
            run.not_moving.set()
        return time.monotonic() - started

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)

    async def _recover(self, slot: Slot) -> None:
        """Give the slot back, as soon as no worker writes it any more."""
        assert self._call
        call, run, recoveries = self._call, self._run, self._installer.recoveries
        await run.give_back(slot, lost=True)

        async def recover() -> None:
            await call.ended()
            await run.give_back(slot)

        task = asyncio.get_running_loop().create_task(recover())
        recoveries.add(task)
        task.add_done_callback(recoveries.discard)
