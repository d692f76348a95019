"""Server state that installs work with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from rollout_server.engine.proxy import EngineProxy
from rollout_server.installs.live_weights import LiveWeights
from rollout_server.ipc.client import Workers
from rollout_server.runs.table import RunTable
from shared.weights import PushReceipt


@dataclass
class InstallContext:
    """State that all installs of this server share."""

    proxy: EngineProxy
    workers: Workers
    runs: RunTable
    boot_id: str
    receipts: dict[int, PushReceipt] = field(default_factory=dict)  # by install_seq
    recoveries: set[asyncio.Task[None]] = field(default_factory=set)
    fill_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # the workers have one receive buffer each

    def __post_init__(self) -> None:
        self.weights = LiveWeights(self.proxy, self.workers)

    def remember(self, receipt: PushReceipt) -> None:
        """Keep the receipt as long as its version is served."""
        served = {run.active.install_seq for run in self.runs.runs.values() if run.active}
        self.receipts = {seq: kept for seq, kept in self.receipts.items() if seq in served}
        self.receipts[receipt.install_seq] = receipt
