"""Installs of pushed adapters: announce, fill, verify, flip. Nothing is served before all checks have passed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace

from rollout_server.engine.sleep import Sleep
from rollout_server.installs.broadcast_groups import BroadcastGroups
from rollout_server.installs.live_weights import LiveWeights, MergeInstall
from rollout_server.installs.slot_install import InstallContext, SlotInstall
from rollout_server.installs.staging import Staging
from rollout_server.runs.slots import Run
from rollout_server.settings import ServerSettings
from shared.adapter_file import AdapterHeader
from shared.collective import Announcement
from shared.errors import (
    BaseMismatch,
    InvalidRequest,
    MalformedAdapter,
    NotFinite,
    RankTooHigh,
    StaleVersion,
    Timeout,
    UnknownLayout,
    UnsupportedAdapter,
)
from shared.weights import SERVED_RANKS, AdapterManifest, InFlight, PushReceipt, ServerState

_LAYOUTS_KNOWN = 8  # fewer than a worker keeps, so that it always knows them


@dataclass
class Installer:
    """Takes pushes for all runs of this server."""

    context: InstallContext
    groups: BroadcastGroups
    served: ServerState
    settings: ServerSettings
    sleep: Sleep
    _known_layouts: list[str] = field(default_factory=list)  # keys

    def __post_init__(self) -> None:
        self.runs = self.context.runs
        self._install = MergeInstall if self.settings.merges else SlotInstall
        self.staging = Staging(self.settings.max_adapter_mib * 2**20)

    async def push(
        self, run_id: str, lease: str, takeover: bool, body: AsyncIterator[bytes], in_flight: InFlight = "drain"
    ) -> PushReceipt:
        """Receive one adapter over HTTP and install it. After an error nothing served has changed."""
        self.runs.places(run_id, lease, takeover)  # before anything of it is read
        self._check_in_flight(in_flight)
        deadline = time.monotonic() + self.settings.push_timeout
        check = functools.partial(self._check, run_id, lease, takeover)
        try:
            async with asyncio.timeout(self.settings.push_timeout):
                memory, header, seconds = await self.staging.receive(body, check)
        except TimeoutError:
            raise Timeout(
                f"the push did not arrive within {self.settings.push_timeout} s; see --push-timeout"
            ) from None
        try:
            async with self._opened(run_id, lease, takeover) as run:
                receipt = self._check_order(run_id, lease, header.manifest)
                if receipt is None:
                    install = self._install(self.context, run, lease, header, deadline, in_flight, "http", seconds)
                    async with install.filling(memory):
                        receipt = await install.finish()
        except BaseException:
            memory.free()  # not used again: a worker may still be reading it
            raise
        self.staging.give_back(memory)
        return receipt

    async def broadcast(
        self, run_id: str, lease: str, announced: Announcement, in_flight: InFlight = "drain"
    ) -> AsyncGenerator[PushReceipt | None, None]:
        """Install one adapter that arrives by broadcast: yield None when the workers receive, then the receipt.

        Raises:
            LockstepError: as `push`; `no_group` if the run's learner has joined none, `unknown_layout` if its last push
                had another layout. If the transfer itself fails the group is left on all workers.
        """
        self._check_in_flight(in_flight)
        deadline = time.monotonic() + self.settings.push_timeout
        last = self.runs.get(run_id).header
        if last is None or last.layout.key != announced.layout:
            raise UnknownLayout(f"run {run_id} has pushed no adapter of this layout; push it over HTTP")
        manifest = last.manifest.model_copy(update={"version": announced.version, "checksum": announced.checksum})
        header = replace(last, manifest=manifest)
        await self._check(run_id, lease, False, header)
        async with self._opened(run_id, lease, False) as run:
            if repeated := self._check_order(run_id, lease, header.manifest):
                yield repeated
                return
            group = self.groups.of(run)
            timeout = min(self.settings.collective_timeout, deadline - time.monotonic())
            install = self._install(self.context, run, lease, header, deadline, in_flight, "collective")
            try:
                async with install.filling({"group": group, "timeout": timeout}):
                    await install.acknowledged()
                    yield None
                    receipt = await install.finish()
            except NotFinite:  # it arrived, so all ranks are still in step with each other
                raise
            except BaseException:
                self.groups.leave(run)
                raise
            yield receipt

    def _check_in_flight(self, in_flight: InFlight) -> None:
        # The other policies pause the engine, and which tokens they affect depends on when a push arrives.
        if self.settings.deterministic and in_flight != "drain":
            raise InvalidRequest(
                f"in_flight={in_flight}: on a server started with --deterministic running requests finish on their "
                "version; use drain"
            )

    async def end(self, run_id: str, lease: str, takeover: bool = False) -> None:
        """Remove a run, after a push of it that is under way. A base that it was merged into is restored bit by bit.

        Raises `no_free_slot` if running requests do not end in time; the run stays then.
        """
        run = self.runs.get(run_id)
        # Without --apply merge no weight is written.
        awake = self.sleep.kept_awake() if self.settings.merges else contextlib.nullcontext()
        async with awake, run.ring.push_lock:
            if run.closed:
                return
            self.runs.check_end(run, lease, takeover)  # a takeover may have come in between
            if self.settings.merges:
                deadline = time.monotonic() + self.settings.push_timeout
                weights = LiveWeights(self.context.proxy, self.context.workers)
                await weights.update(run, None, deadline, lambda _: self.runs.close(run_id))
            else:
                self.runs.close(run_id)
        self.groups.leave_lost()

    @contextlib.asynccontextmanager
    async def _opened(self, run_id: str, lease: str, takeover: bool) -> AsyncIterator[Run]:
        """Hold the push lock of the run with the engine awake; whose run it is changes with the flip alone."""
        async with self.sleep.kept_awake(), self.runs.opened(run_id, lease, takeover) as run:
            try:
                yield run
            finally:
                self.groups.leave_lost()

    async def _check(self, run_id: str, lease: str, takeover: bool, header: AdapterHeader) -> None:
        """Run all checks that need no tensor."""
        served, manifest, key = self.served, header.manifest, header.layout.key
        if manifest.version.run_id != run_id:
            raise MalformedAdapter(f"the push for run {run_id} carries version {manifest.version}")
        if manifest.base_weights is not None and manifest.base_weights != served.base.weights:
            raise BaseMismatch(
                f"the adapter was trained on base {manifest.base_weights}, this server serves {served.base.weights} "
                f"({served.model}); start both on the same checkpoint"
            )
        max_rank = max(module.rank for module in manifest.modules.values())
        if max_rank > served.max_lora_rank:
            raise RankTooHigh(
                f"rank {max_rank} is above the server's --max-lora-rank {served.max_lora_rank}: start it with one of "
                f"{', '.join(map(str, SERVED_RANKS))}"
            )
        if manifest.dtype != served.lora_dtype:
            raise UnsupportedAdapter(
                f"the adapter comes in {manifest.dtype}, the slots hold {served.lora_dtype} (/v1/state: lora_dtype)"
            )
        altering = [key for key in ("use_dora", "lora_bias", "modules_to_save") if manifest.peft_config.get(key)]
        if altering:
            raise UnsupportedAdapter(f"{', '.join(altering)} cannot be served; train plain LoRA")
        self.runs.places(run_id, lease, takeover)
        self._check_order(run_id, lease, manifest)
        if key not in self._known_layouts:
            entries = [[e.name, e.dtype, e.shape, e.start, e.end] for e in header.layout.entries]
            await self.context.workers.call("check", timeout=30.0, entries=entries)
            self._known_layouts = [*self._known_layouts, key][-_LAYOUTS_KNOWN:]

    def _check_order(self, run_id: str, lease: str, manifest: AdapterManifest) -> PushReceipt | None:
        """Refuse a version older than the served one; return the receipt again if it is its learner's own push."""
        run = self.runs.runs.get(run_id)
        slot = run.active if run else None
        if run is None or slot is None or slot.version is None or manifest.version > slot.version:
            return None
        if (manifest.version, manifest.checksum, lease) == (slot.version, slot.checksum, run.lease):
            assert slot.receipt is not None
            run.finished = None  # as after any other push
            return slot.receipt.model_copy(update={"repeated": True})
        raise StaleVersion(
            f"{manifest.version} does not come after {slot.version}, which is being served",
            served=slot.version.model_dump(),
        )
