"""Adapter -> server: who owns the run, what was pushed last, and whether it is still there."""

from __future__ import annotations

import functools
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from peft import PeftModel

from learner.adapter import AdapterExport, AdapterExporter
from learner.client import RolloutClient
from learner.config import default_run_id
from learner.ranks import OnMain, on_one_rank
from learner.transport import Choice, Transport
from shared.errors import ErrorCode, LockstepError
from shared.weights import AdapterManifest, InFlight, PushReceipt, ServerState, WeightVersion

LEASE_FILE = "lease.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Lease:
    """The right to push to a run: its secret, and a fence that outranks all lower ones."""

    run_id: str
    secret: str
    fence: int


def load_lease(output_dir: str | Path, run_id: str | None) -> Lease:
    """The lease kept in `output_dir`, or a new one; nothing is written yet.

    A directory that holds a lease is the same run started again: same secret, next fence.
    """
    path = Path(output_dir) / LEASE_FILE
    if path.is_file():
        try:
            kept = Lease(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise LockstepError(
                ErrorCode.INVALID_REQUEST,
                f"{path} is damaged ({error}); remove it and use --takeover, or a new output_dir",
            ) from error
        if run_id in (None, kept.run_id):
            return Lease(kept.run_id, kept.secret, kept.fence + 1)
    return Lease(run_id or default_run_id(output_dir), secrets.token_hex(16), 0)


def save_lease(output_dir: str | Path, lease: Lease) -> None:
    """Keep the lease, readable by its owner only; the file is never seen half-written."""
    path = Path(output_dir) / LEASE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        json.dump(asdict(lease), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


class Publisher:
    """Pushes the adapter of one model to one server and knows what is served there.

    With several ranks each has a publisher of the same lease: all take part in an export, rank 0 sends it.

    Attributes:
        receipts: one for every push, the initial adapter (step 0) included.
        seconds: wall-clock seconds of every push, from export to receipt.

    Args:
        patience_s: how long a push waits for a server that is away.
    """

    def __init__(
        self,
        client: RolloutClient,
        model: PeftModel,
        lease: Lease,
        state: ServerState,
        *,
        base_weights: str | None = None,
        takeover: bool = False,
        transport: Choice = "auto",
        in_flight: InFlight = "drain",
        say: Callable[[str], None] = print,
        on_main: OnMain = on_one_rank,
        patience_s: float = 0.0,
    ) -> None:
        self.client = client
        self.lease = _above_served(lease, state)
        self.base_weights = base_weights
        self.workers = state.workers
        self.model, self._state = model, state
        self._choice, self._in_flight, self._say = transport, in_flight, say
        self.takeover = takeover
        self.on_main, self._patience_s = on_main, patience_s
        self._export: AdapterExport | None = None
        # Rollouts that find their run forgotten restore it from threads of their own.
        self._sending = threading.Lock()
        self.receipts: list[PushReceipt] = []
        self.seconds: list[float] = []

    @functools.cached_property
    def exporter(self) -> AdapterExporter:
        """Made at the first push: only then the trainer has put the model where it stays."""
        return AdapterExporter(self.model, dtype=self._state.lora_dtype, base_weights=self.base_weights)

    @functools.cached_property
    def transport(self) -> Transport:
        """The way to the server."""
        device = self.exporter.flat.device
        return Transport(
            self.client, self.lease.run_id, self.lease.secret, device, self._state,
            choice=self._choice, in_flight=self._in_flight, say=self._say,
        )  # fmt: skip

    @property
    def last(self) -> PushReceipt | None:
        """Receipt of the last push."""
        return self.receipts[-1] if self.receipts else None

    def version(self, step: int) -> WeightVersion:
        """The version that `step` has in this learner's hands."""
        return WeightVersion(run_id=self.lease.run_id, fence=self.lease.fence, step=step)

    def push(self, step: int) -> PushReceipt:
        """Export the adapter, send it, check the receipt. When this returns, the server samples from it. Collective.

        Raises:
            LockstepError: whatever the server refuses; `install_failed` if the receipt is not for what was
            sent.
        """
        started = time.perf_counter()
        with self._sending:
            export = self._export = self.exporter.export(self.version(step))

            def send() -> PushReceipt:
                receipt = self._patiently(lambda: self.transport.send(export, takeover=self.takeover))
                self.takeover = False  # said once: a learner that is taken over itself must not take the run back
                self._check(receipt, export.manifest)
                return receipt

            receipt = self.on_main(send)
        self.receipts.append(receipt)
        self.seconds.append(time.perf_counter() - started)
        return receipt

    def ensure(self, step: int) -> PushReceipt:
        """Make sure that the server serves `step`: push again if it restarted or serves anything else. Collective."""
        last = self.last
        if last is not None and last.version == self.version(step):
            state = self.on_main(lambda: self._patiently(self.client.state))
            if state.epoch == last.epoch and self._serves(state, last.version, last.checksum):
                return last
        return self.push(step)

    def restore(self) -> None:
        """Send what was exported last once more, over HTTP, if the server has forgotten it.

        Not collective: any rank may call it, from any thread, and several may at once.

        Raises:
            LockstepError: as `push`.
        """
        with self._sending:
            export = self._export
            if export is None or self._serves(self.client.state(), export.manifest.version, export.manifest.checksum):
                return
            try:
                receipt = self.client.push(
                    self.lease.run_id, export.pieces(), self.lease.secret, in_flight=self._in_flight
                )  # fmt: skip
            except LockstepError as error:
                if error.code is ErrorCode.STALE_VERSION:  # another rank was faster, with a later step
                    return
                raise
            self._check(receipt, export.manifest)

    def close(self) -> None:
        """Let go of the way to the server; what was pushed stays there."""
        if "transport" in self.__dict__:
            self.transport.close()

    def _patiently(self, action: Callable[[], T]) -> T:
        """Once more if the server is away, as soon as it is back."""
        try:
            return action()
        except LockstepError as error:
            if error.code is not ErrorCode.NOT_READY or not self._patience_s:
                raise
            self._say(f"{error}; waiting until the server is back")
        self.client.wait_ready(self._patience_s)
        return action()

    def _serves(self, state: ServerState, version: WeightVersion, checksum: str) -> bool:
        return any(
            (run.run_id, run.version, run.checksum) == (self.lease.run_id, version, checksum) for run in state.runs
        )

    def _check(self, receipt: PushReceipt, manifest: AdapterManifest) -> None:
        expected = (manifest.version, manifest.checksum, len(manifest.modules), self.workers)
        got = (receipt.version, receipt.checksum, receipt.modules, receipt.workers)
        names = ("version", "checksum", "modules written", "workers that acknowledged")
        wrong = [f"{n}: {g} instead of {e}" for n, e, g in zip(names, expected, got, strict=True) if e != g]
        if wrong:
            raise LockstepError(
                ErrorCode.INSTALL_FAILED,
                f"the receipt for {manifest.version} is not for what was sent ({'; '.join(wrong)}); "
                "restart the rollout server",
            )


def _above_served(lease: Lease, state: ServerState) -> Lease:
    """A fence above that of the version being served; the kept lease may be older than that."""
    for run in state.runs:
        if run.run_id == lease.run_id and run.version is not None and run.version.fence >= lease.fence:
            return Lease(lease.run_id, lease.secret, run.version.fence + 1)
    return lease
