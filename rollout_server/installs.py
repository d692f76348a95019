"""A push from announcement to receipt: announce, fill, verify, flip. Nothing is served before all has been checked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from rollout_server.admission import KV
from rollout_server.engine import EngineDoor
from rollout_server.groups import Groups
from rollout_server.identity import ServedModel
from rollout_server.settings import ServerSettings
from rollout_server.slots import Run, RunTable, Slot
from rollout_server.transports.http import Staging
from rollout_server.workers import Call, Workers
from shared.adapter_file import AdapterHeader
from shared.collective import Announcement
from shared.errors import ErrorCode, LockstepError
from shared.weights import AdapterManifest, InFlight, PushReceipt

_CHECK_SECONDS = 30.0
_SWAP_SECONDS = 10.0
_LAYOUTS_KNOWN = 8  # fewer than a worker keeps, so that it always knows them


@dataclass
class Installer:
    """Takes pushes for all runs of this server."""

    door: EngineDoor
    workers: Workers
    groups: Groups
    runs: RunTable
    served: ServedModel
    settings: ServerSettings
    epoch: str
    _receipts: dict[int, PushReceipt] = field(default_factory=dict)
    _known_layouts: dict[str, None] = field(default_factory=dict)
    _recoveries: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The workers have one receive buffer each.
        self._fill_lock = asyncio.Lock()
        self.staging = Staging(self.settings.max_adapter_mib * 2**20)

    async def push(
        self, run_id: str, lease: str, takeover: bool, body: AsyncIterator[bytes], in_flight: InFlight = "drain"
    ) -> PushReceipt:
        """Receive one adapter over HTTP and install it.

        Args:
            in_flight: what becomes of running requests: `shared.weights.InFlight`.

        Raises:
            LockstepError: whatever is wrong with the push; what is served has not changed then.
        """
        deadline = time.monotonic() + self.settings.push_timeout

        async def check(header: AdapterHeader) -> None:
            await self._check(run_id, lease, takeover, header)

        try:
            async with asyncio.timeout(self.settings.push_timeout):
                staged = await self.staging.receive(body, check)
        except TimeoutError:
            raise LockstepError(
                ErrorCode.TIMEOUT, f"the push did not arrive within {self.settings.push_timeout} s; see --push-timeout"
            ) from None
        read = False
        try:
            async with self._opened(run_id, lease, takeover) as run:
                if repeated := self._check_order(run_id, staged.header.manifest):
                    read = True
                    return repeated
                source = {
                    "path": staged.memory.path,
                    "memory": staged.memory.number,
                    "offset": staged.header.data_offset,
                }
                install = _Install(self, run, staged.header, deadline, in_flight, "http", staged.seconds)
                async with install.filling(source):
                    receipt = await install.finish()
                read = True
                return receipt
        finally:
            if read:
                self.staging.give_back(staged.memory)
            else:  # a worker may still be reading it
                staged.memory.free()

    async def broadcast(
        self, run_id: str, lease: str, announced: Announcement, in_flight: InFlight = "drain"
    ) -> AsyncGenerator[PushReceipt | None, None]:
        """Install one adapter that comes by broadcast: yields None when the workers receive, then the receipt.

        Raises:
            LockstepError: as `push`; `no_group` if the run's learner has joined none, `unknown_layout` if its last push
                had another layout. If the transfer itself fails the group is left on all workers.
        """
        deadline = time.monotonic() + self.settings.push_timeout
        header = self._as_last_time(self.runs.get(run_id), announced)
        await self._check(run_id, lease, False, header)
        async with self._opened(run_id, lease, False) as run:
            if repeated := self._check_order(run_id, header.manifest):
                yield repeated
                return
            group = self.groups.of(run)
            timeout = min(self.settings.collective_timeout, deadline - time.monotonic())
            install = _Install(self, run, header, deadline, in_flight, "collective")
            try:
                async with install.filling({"group": group, "timeout": timeout}):
                    await install.told()
                    yield None
                    receipt = await install.finish()
            except BaseException as error:
                # After a refusal of what arrived all members are still in step with each other.
                if not (isinstance(error, LockstepError) and error.code is ErrorCode.NOT_FINITE):
                    self.groups.leave(run)
                raise
            yield receipt

    def _as_last_time(self, run: Run, announced: Announcement) -> AdapterHeader:
        """The header of an adapter that is announced as like the last one."""
        last = run.header
        if last is None or last.layout.key != announced.layout:
            raise LockstepError(
                ErrorCode.UNKNOWN_LAYOUT, f"run {run.run_id} has pushed no adapter of this layout; push it over HTTP"
            )
        manifest = last.manifest.model_copy(update={"version": announced.version, "checksum": announced.checksum})
        return replace(last, manifest=manifest)

    @contextlib.asynccontextmanager
    async def _opened(self, run_id: str, lease: str, takeover: bool) -> AsyncIterator[Run]:
        """The run, and its turn to install; if its first push fails its place goes to others."""
        try:
            run = self.runs.open(run_id, lease, takeover)
            async with run.push_lock:
                yield run
        finally:
            opened = self.runs.runs.get(run_id)
            if opened is not None and opened.active is None and not opened.push_lock.locked():
                self.runs.close(run_id)

    async def _check(self, run_id: str, lease: str, takeover: bool, header: AdapterHeader) -> None:
        """Everything that can be known before a tensor moves."""
        self._check_identity(run_id, header.manifest)
        self.runs.check_open(run_id, lease, takeover)
        self._check_order(run_id, header.manifest)
        await self._check_shapes(header)

    def _check_identity(self, run_id: str, manifest: AdapterManifest) -> None:
        served = self.served
        if manifest.version.run_id != run_id:
            raise LockstepError(
                ErrorCode.MALFORMED_ADAPTER, f"the push for run {run_id} carries version {manifest.version}"
            )
        if manifest.base_weights is not None and manifest.base_weights != served.base.weights:
            raise LockstepError(
                ErrorCode.BASE_MISMATCH,
                f"the adapter was trained on base {manifest.base_weights}, this server serves {served.base.weights} "
                f"({served.model}); start both on the same checkpoint",
            )
        if manifest.max_rank > served.max_lora_rank:
            raise LockstepError(
                ErrorCode.RANK_TOO_HIGH,
                f"rank {manifest.max_rank} is above the server's --max-lora-rank {served.max_lora_rank}",
            )
        if manifest.dtype != served.lora_dtype:
            raise LockstepError(
                ErrorCode.UNSUPPORTED_ADAPTER,
                f"the adapter comes in {manifest.dtype}, the slots hold {served.lora_dtype} (/v1/state: lora_dtype)",
            )
        altering = [key for key in ("use_dora", "lora_bias", "modules_to_save") if manifest.peft_config.get(key)]
        if altering:
            raise LockstepError(
                ErrorCode.UNSUPPORTED_ADAPTER, f"{', '.join(altering)} cannot be served; train plain LoRA"
            )

    def _check_order(self, run_id: str, manifest: AdapterManifest) -> PushReceipt | None:
        """Refuse what is older than what is served; the receipt again if it is the very same."""
        run = self.runs.runs.get(run_id)
        slot = run.active if run else None
        if slot is None or slot.version is None or manifest.version > slot.version:
            return None
        if manifest.version == slot.version and manifest.checksum == slot.checksum:
            return self._receipts[slot.install_seq].model_copy(update={"repeated": True})
        raise LockstepError(
            ErrorCode.STALE_VERSION,
            f"{manifest.version} does not come after {slot.version}, which is being served",
            served=slot.version.model_dump(),
        )

    async def _check_shapes(self, header: AdapterHeader) -> None:
        key = header.layout.key
        if key in self._known_layouts:
            return
        entries = [[e.name, e.dtype, e.shape, e.start, e.end] for e in header.layout.entries]
        await self.workers.call("check", _CHECK_SECONDS, entries=entries)
        self._known_layouts[key] = None
        if len(self._known_layouts) > _LAYOUTS_KNOWN:
            self._known_layouts.pop(next(iter(self._known_layouts)))

    def _remember(self, receipt: PushReceipt) -> None:
        served = {run.active.install_seq for run in self.runs.runs.values() if run.active}
        self._receipts = {seq: kept for seq, kept in self._receipts.items() if seq in served}
        self._receipts[receipt.install_seq] = receipt


class _Install:
    """One adapter on its way into a slot, and the seconds that each part takes."""

    def __init__(
        self, installer: Installer, run: Run, header: AdapterHeader, deadline: float, in_flight: InFlight,
        transport: str, sent_seconds: float = 0.0,
    ) -> None:  # fmt: skip
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
        async with self._installer._fill_lock:
            try:
                self._call = self._installer.workers.begin(
                    "fill", slot_id=slot.slot_id, key=self._header.layout.key,
                    checksum=self._header.manifest.checksum, **source,
                )  # fmt: skip
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
        assert self._call and self._slot
        installer, run, slot, manifest = self._installer, self._run, self._slot, self._header.manifest
        answers = await self._call.answers(self._left())
        written = time.monotonic()
        if run.closed:
            raise LockstepError(ErrorCode.UNKNOWN_RUN, f"run {run.run_id} was deleted while a push was under way")
        install_seq = installer.runs.next_install_seq()
        pause_seconds = 0.0
        if self._in_flight == "drain" or run.active is None or run.active.requests == 0:
            self._slot = None
            await run.flip(slot, manifest.version, install_seq, manifest.checksum)
        else:
            pause_seconds = await self._move(run, run.active, slot, install_seq)
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
            flip_seconds=time.monotonic() - written,
            pause_seconds=pause_seconds,
        )
        run.header = self._header
        installer._remember(receipt)
        return receipt

    async def _move(self, run: Run, active: Slot, spare: Slot, install_seq: int) -> float:
        """Let running requests go on with the new adapter: the two slots change places while the engine is paused.

        Answers the seconds of the pause.
        """
        door, manifest = self._installer.door, self._header.manifest
        kv: KV = "carried" if self._in_flight == "carried" else "fresh"
        started = time.monotonic()
        run.not_moving.clear()
        try:
            async with asyncio.timeout(self._left()), door.paused(clear_cache=kv == "fresh") as tokens:
                try:
                    await self._installer.workers.call(
                        "swap", _SWAP_SECONDS, one=active.slot_id, other=spare.slot_id
                    )  # fmt: skip
                except BaseException:
                    door.give_up(LockstepError(ErrorCode.ENGINE_DEAD, "not every worker exchanged its adapter slots"))
                    raise
                self._slot = None
                await run.move_to(
                    spare, manifest.version, install_seq, manifest.checksum,
                    lambda admission: admission.move(tokens, manifest.version, kv),
                )  # fmt: skip
        except TimeoutError:
            raise LockstepError(
                ErrorCode.INSTALL_FAILED, "the engine did not pause before the push's deadline"
            ) from None
        finally:
            run.not_moving.set()
        return time.monotonic() - started

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)

    async def _recover(self, slot: Slot) -> None:
        """Give the slot back, as soon as no worker writes it any more."""
        assert self._call
        call, run, recoveries = self._call, self._run, self._installer._recoveries
        await run.give_back(slot, lost=True)

        async def recover() -> None:
            await call.ended()
            await run.give_back(slot)

        task = asyncio.get_running_loop().create_task(recover())
        recoveries.add(task)
        task.add_done_callback(recoveries.discard)
