"""A push from announcement to receipt: announce, fill, verify, flip. Nothing is served before all has been checked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from rollout_server.engine import EngineDoor
from rollout_server.identity import ServedModel
from rollout_server.settings import ServerSettings
from rollout_server.slots import Run, RunTable, Slot
from rollout_server.transports.http import StagedAdapter, receive_adapter
from shared.adapter_file import LORA_A, LORA_B, AdapterHeader
from shared.errors import ErrorCode, LockstepError
from shared.weights import AdapterManifest, PushReceipt

_POLL_SECONDS = 0.05
_RPC_SECONDS = 30.0


@dataclass
class Installer:
    """Takes pushes for all runs of this server."""

    door: EngineDoor
    runs: RunTable
    served: ServedModel
    settings: ServerSettings
    epoch: str

    def __post_init__(self) -> None:
        # Two fills at once would fight over the workers' one fill thread.
        self._fill_lock = asyncio.Lock()
        self._ticket = 0
        self._receipts: dict[int, PushReceipt] = {}
        self._recoveries: set[asyncio.Task[None]] = set()

    async def push(self, run_id: str, lease: str, takeover: bool, body: AsyncIterator[bytes]) -> PushReceipt:
        """Receive and install one adapter.

        Raises:
            LockstepError: whatever is wrong with the push; what is served has not changed then.
        """
        deadline = time.monotonic() + self.settings.push_timeout

        async def check(header: AdapterHeader) -> None:
            self._check_identity(run_id, header.manifest)
            self.runs.check_open(run_id, lease, takeover)
            self._check_order(run_id, header.manifest)
            await self._check_shapes(header)

        try:
            async with asyncio.timeout(self.settings.push_timeout):
                staged = await receive_adapter(body, self.settings.max_adapter_mib * 2**20, check)
        except TimeoutError:
            raise LockstepError(
                ErrorCode.TIMEOUT, f"the push did not arrive within {self.settings.push_timeout} s; see --push-timeout"
            ) from None
        try:
            run = self.runs.open(run_id, lease, takeover)
            async with run.push_lock:
                repeated = self._check_order(run_id, staged.header.manifest)
                return repeated or await self._install(run, staged, deadline)
        finally:
            staged.discard()
            opened = self.runs.runs.get(run_id)
            if opened is not None and opened.active is None and not opened.push_lock.locked():
                self.runs.close(run_id)  # its first push failed: leave its place to others

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
        shapes = {entry.name: entry.shape for entry in header.entries}
        modules = {
            name: [spec.rank, shapes[name + LORA_A][1], shapes[name + LORA_B][0]]
            for name, spec in header.manifest.modules.items()
        }
        _raise_first(await self.door.call_workers("lockstep_check", modules, timeout=_RPC_SECONDS))

    async def _install(self, run: Run, staged: StagedAdapter, deadline: float) -> PushReceipt:
        manifest = staged.header.manifest
        waited = time.monotonic()
        slot = await run.reserve(deadline)
        filling = time.monotonic()
        answers = await self._fill(run, slot, staged, deadline)
        flipping = time.monotonic()
        install_seq = self.runs.next_install_seq()
        if run.closed:
            await run.give_back(slot)
            raise LockstepError(ErrorCode.UNKNOWN_RUN, f"run {run.run_id} was deleted while a push was under way")
        await run.flip(slot, manifest.version, install_seq, manifest.checksum)
        receipt = PushReceipt(
            epoch=self.epoch,
            version=manifest.version,
            install_seq=install_seq,
            checksum=manifest.checksum,
            bytes=staged.header.total_bytes,
            workers=len(answers),
            modules=answers[0]["modules"],
            transfer_seconds=staged.seconds,
            wait_seconds=filling - waited,
            install_seconds=flipping - filling,
            flip_seconds=time.monotonic() - flipping,
        )
        self._receipts = {install_seq: receipt, **_of_served_slots(self._receipts, self.runs)}
        return receipt

    async def _fill(self, run: Run, slot: Slot, staged: StagedAdapter, deadline: float) -> list[dict[str, Any]]:
        """Write and verify on every worker; on any failure the slot is given back and nothing has changed."""
        async with self._fill_lock:
            self._ticket += 1
            ticket = self._ticket
            try:
                _raise_first(
                    await self.door.call_workers(
                        "lockstep_fill", slot.slot_id, str(staged.path), ticket, timeout=_RPC_SECONDS
                    )
                )
                answers = await self._await_fill(ticket, deadline)
                _raise_first(answers)
                if len(answers) != self.served.workers:
                    raise LockstepError(
                        ErrorCode.INSTALL_FAILED, f"{len(answers)} of {self.served.workers} workers acknowledged"
                    )
                return answers
            except BaseException:
                await self._recover(run, slot, ticket)
                raise

    async def _await_fill(self, ticket: int, deadline: float) -> list[dict[str, Any]]:
        # The first poll waits a moment on the worker: most fills are done by then, and one call is enough.
        wait_s = 0.02
        while True:
            answers = await self.door.call_workers("lockstep_poll", ticket, wait_s, timeout=_RPC_SECONDS)
            if all(answer["done"] for answer in answers):
                return answers
            if time.monotonic() > deadline:
                raise LockstepError(
                    ErrorCode.INSTALL_FAILED,
                    "the workers did not finish writing the adapter before the push's deadline",
                )
            await asyncio.sleep(_POLL_SECONDS)
            wait_s = 0.0

    async def _recover(self, run: Run, slot: Slot, ticket: int) -> None:
        """Give the slot back once no worker writes it any more."""
        await run.give_back(slot, lost=True)

        async def recover() -> None:
            with contextlib.suppress(LockstepError):
                while True:
                    answers = await self.door.call_workers("lockstep_poll", ticket, 0.0, timeout=_RPC_SECONDS)
                    if all(answer["done"] for answer in answers):
                        break
                    await asyncio.sleep(1.0)
                await run.give_back(slot)

        task = asyncio.get_running_loop().create_task(recover())
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)


def _of_served_slots(receipts: dict[int, PushReceipt], runs: RunTable) -> dict[int, PushReceipt]:
    served = {run.active.install_seq for run in runs.runs.values() if run.active}
    return {seq: receipt for seq, receipt in receipts.items() if seq in served}


def _raise_first(answers: list[dict[str, Any]]) -> None:
    """Raise what the first worker that refused says."""
    for answer in answers:
        if not answer["ok"]:
            raise LockstepError(ErrorCode(answer["code"]), answer["message"])
