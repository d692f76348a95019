"""A push from announcement to receipt: announce, fill, verify, flip. Nothing is served before all has been checked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace

from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.sleep import Sleep
from rollout_server.installs.broadcast_groups import Groups
from rollout_server.installs.live_weights import LiveWeights
from rollout_server.installs.merge_install import MergeInstall
from rollout_server.installs.slot_install import SlotInstall
from rollout_server.installs.staging import Staging
from rollout_server.ipc.client import Workers
from rollout_server.runs.served_model import ServedModel
from rollout_server.runs.slots import Run
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from shared.adapter_file import AdapterHeader
from shared.collective import Announcement
from shared.errors import (
    BaseMismatch,
    ErrorCode,
    InvalidRequest,
    LockstepError,
    MalformedAdapter,
    RankTooHigh,
    StaleVersion,
    Timeout,
    UnknownLayout,
    UnsupportedAdapter,
)
from shared.weights import AdapterManifest, InFlight, PushReceipt

_CHECK_SECONDS = 30.0
_LAYOUTS_KNOWN = 8  # fewer than a worker keeps, so that it always knows them


@dataclass
class Installer:
    """Takes pushes for all runs of this server."""

    proxy: EngineProxy
    workers: Workers
    groups: Groups
    runs: RunTable
    served: ServedModel
    settings: ServerSettings
    epoch: str
    sleep: Sleep
    _receipts: dict[int, PushReceipt] = field(default_factory=dict)
    _known_layouts: dict[str, None] = field(default_factory=dict)
    recoveries: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The workers have one receive buffer each.
        self.fill_lock = asyncio.Lock()
        self.weights = LiveWeights(self.proxy, self.workers)
        self._install = MergeInstall if self.settings.merges else SlotInstall
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
        self._check_in_flight(in_flight)
        deadline = time.monotonic() + self.settings.push_timeout

        async def check(header: AdapterHeader) -> None:
            await self._check(run_id, lease, takeover, header)

        try:
            async with asyncio.timeout(self.settings.push_timeout):
                staged = await self.staging.receive(body, check)
        except TimeoutError:
            raise Timeout(
                f"the push did not arrive within {self.settings.push_timeout} s; see --push-timeout"
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
                install = self._install(self, run, staged.header, deadline, in_flight, "http", staged.seconds)
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
        self._check_in_flight(in_flight)
        deadline = time.monotonic() + self.settings.push_timeout
        header = self._as_last_time(self.runs.get(run_id), announced)
        await self._check(run_id, lease, False, header)
        async with self._opened(run_id, lease, False) as run:
            if repeated := self._check_order(run_id, header.manifest):
                yield repeated
                return
            group = self.groups.of(run)
            timeout = min(self.settings.collective_timeout, deadline - time.monotonic())
            install = self._install(self, run, header, deadline, in_flight, "collective")
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

    def _check_in_flight(self, in_flight: InFlight) -> None:
        """When a push overtakes a running request is a matter of time, and both would pause the engine."""
        if self.settings.deterministic and in_flight != "drain":
            raise InvalidRequest(
                f"in_flight={in_flight}: on a server started with --deterministic running requests finish on their "
                "version; use drain"
            )

    def _as_last_time(self, run: Run, announced: Announcement) -> AdapterHeader:
        """The header of an adapter that is announced as like the last one."""
        last = run.header
        if last is None or last.layout.key != announced.layout:
            raise UnknownLayout(f"run {run.run_id} has pushed no adapter of this layout; push it over HTTP")
        manifest = last.manifest.model_copy(update={"version": announced.version, "checksum": announced.checksum})
        return replace(last, manifest=manifest)

    async def end(self, run_id: str) -> None:
        """Forget a run, after a push of it that is under way. A base that it was merged into is restored to the bit.

        Raises:
            LockstepError: `no_free_slot` if that has to wait for running requests too long; the run lives on then.
        """
        run = self.runs.get(run_id)
        # Only a base that is to be restored is written to.
        awake = self.sleep.kept_awake() if self.settings.merges else contextlib.nullcontext()
        async with awake, run.push_lock:
            if self.settings.merges and run.active is not None:
                deadline = time.monotonic() + self.settings.push_timeout
                async with self.weights.changed(run, None, deadline):
                    self.runs.close(run_id)
            elif not run.closed:
                self.runs.close(run_id)
        self.groups.leave(run)

    @contextlib.asynccontextmanager
    async def _opened(self, run_id: str, lease: str, takeover: bool) -> AsyncIterator[Run]:
        """The run, and its turn to install; if its first push fails its place goes to others."""
        try:
            while self.settings.merges and (replaced := self.runs.replaced_by(run_id, takeover)):
                await self.end(replaced)
            async with self.sleep.kept_awake():
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
            raise MalformedAdapter(f"the push for run {run_id} carries version {manifest.version}")
        if manifest.base_weights is not None and manifest.base_weights != served.base.weights:
            raise BaseMismatch(
                f"the adapter was trained on base {manifest.base_weights}, this server serves {served.base.weights} "
                f"({served.model}); start both on the same checkpoint"
            )
        if manifest.max_rank > served.max_lora_rank:
            raise RankTooHigh(f"rank {manifest.max_rank} is above the server's --max-lora-rank {served.max_lora_rank}")
        if manifest.dtype != served.lora_dtype:
            raise UnsupportedAdapter(
                f"the adapter comes in {manifest.dtype}, the slots hold {served.lora_dtype} (/v1/state: lora_dtype)"
            )
        altering = [key for key in ("use_dora", "lora_bias", "modules_to_save") if manifest.peft_config.get(key)]
        if altering:
            raise UnsupportedAdapter(f"{', '.join(altering)} cannot be served; train plain LoRA")

    def _check_order(self, run_id: str, manifest: AdapterManifest) -> PushReceipt | None:
        """Refuse what is older than what is served; the receipt again if it is the very same."""
        run = self.runs.runs.get(run_id)
        slot = run.active if run else None
        if slot is None or slot.version is None or manifest.version > slot.version:
            return None
        if manifest.version == slot.version and manifest.checksum == slot.checksum:
            return self._receipts[slot.install_seq].model_copy(update={"repeated": True})
        raise StaleVersion(
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

    def remember(self, receipt: PushReceipt) -> None:
        """Keep the receipt as long as its version is served."""
        served = {run.active.install_seq for run in self.runs.runs.values() if run.active}
        self._receipts = {seq: kept for seq, kept in self._receipts.items() if seq in served}
        self._receipts[receipt.install_seq] = receipt
