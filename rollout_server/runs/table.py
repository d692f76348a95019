"""Table of runs: which exist, and which learner may push to them."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rollout_server.runs.slots import Ring, Run, Slot, SlotState
from shared.errors import BaseNotServed, LeaseMismatch, NoFreeRun, UnknownRun


class RunTable:
    """All runs of this server. Slot ids are vLLM's LoRA ids and start at 1."""

    def __init__(self, slots_per_run: int, max_runs: int, *, merged: bool = False) -> None:
        ids = [0] if merged else list(range(1, slots_per_run * max_runs + 1))
        size = 1 if merged else slots_per_run
        self._rings = [Ring([Slot(i) for i in ids[start : start + size]]) for start in range(0, len(ids), size)]
        # Holds slot 0, which it shares with the run, for base requests; None where the base is always served.
        self.base = Run("base", "", self._rings[0]) if merged else None
        self.runs: dict[str, Run] = {}
        self._opening: dict[str, Run] = {}  # that are being pushed to
        self._install_seq = 0

    def next_install_seq(self) -> int:
        """Return the next number of this server's installs; a failed install uses one up too."""
        self._install_seq += 1
        return self._install_seq

    async def admitting(self) -> None:
        """Wait until requests may be admitted."""
        while self.base is not None and not self.base.ring.admits.is_set():
            await self.base.ring.admits.wait()

    def check_base_served(self) -> None:
        """Raise `base_not_served` while an adapter is merged into the weights."""
        served = [run.run_id for run in self.runs.values() if run.active] if self.base else []
        if served:
            raise BaseNotServed(
                f"run {served[0]} is merged into this server's weights (--apply merge): the base is not there until "
                "that run is deleted; ask a server with --apply adapter"
            )

    def get(self, run_id: str | None) -> Run:
        """Return the run of that name; without a name, the only one. Raises `unknown_run`."""
        if run_id is None and len(self.runs) == 1:
            return next(iter(self.runs.values()))
        if not self.runs:
            raise UnknownRun('this server has no run yet: push an adapter first, or ask for the policy "base"')
        if run_id not in self.runs:
            which = f"there is no run {run_id!r}" if run_id is not None else "several runs are served"
            raise UnknownRun(f"{which}: name one with run_id ({', '.join(sorted(self.runs))})")
        return self.runs[run_id]

    def steps(self) -> dict[str, int]:
        """Return run id -> served step."""
        active = [(run_id, run.active) for run_id, run in self.runs.items()]
        return {run_id: slot.version.step for run_id, slot in active if slot and slot.version}

    def check_lease(self, run: Run, lease: str) -> None:
        """Raise `lease_mismatch` unless the learner of that lease holds the run."""
        if not hmac.compare_digest(run.lease.encode(), lease.encode()):
            raise LeaseMismatch(
                f"another learner holds run {run.run_id}; stop it, or take the run over with --takeover"
            )

    def places(self, run_id: str, lease: str, takeover: bool) -> list[Ring]:
        """Return the slots that a push to `run_id` may go to; raises `lease_mismatch`, `no_free_run`. Changes nothing.

        `takeover`: the run may be another learner's, and the slots those of the only other run.
        """
        run = self.runs.get(run_id)
        if run is not None:
            if not takeover:
                self.check_lease(run, lease)
            return [run.ring]
        if run_id in self._opening:
            return [self._opening[run_id].ring]
        taken = [run.ring for run in self.runs.values()]
        free = [ring for ring in self._rings if ring not in taken]
        if free:
            return free
        if takeover and len(self._rings) == 1:
            return self._rings
        raise NoFreeRun(
            f"this server has no room for run {run_id}: it serves {', '.join(sorted(self.runs))}; "
            "end that run, take its place with --takeover, or start the server with --max-runs"
        )

    @asynccontextmanager
    async def opened(self, run_id: str, lease: str, takeover: bool) -> AsyncIterator[Run]:
        """Hold the push lock of the run's slots. A new run is in the table once it is served (`own`).

        Raises as `places`, also for what has changed while it waited.
        """
        while True:
            # A lock that is held may be another new run's, whose push may fail.
            ring = min(self.places(run_id, lease, takeover), key=lambda ring: ring.push_lock.locked())
            async with ring.push_lock:
                if ring not in self.places(run_id, lease, takeover):
                    continue
                run = self._opening[run_id] = self.runs.get(run_id) or Run(run_id, lease, ring)
                try:
                    yield run
                finally:
                    del self._opening[run_id]
                return

    def own(self, run: Run, lease: str) -> None:
        """Give the run to the holder of the lease, and its place to the run: at a flip, and never before."""
        for other in [other for other in self.runs.values() if other.ring is run.ring and other is not run]:
            self.close(other.run_id)
        self.runs[run.run_id] = run
        run.lease = lease

    def close(self, run_id: str) -> None:
        """Remove a run. Its running requests finish; then its slots are free for other runs."""
        run = self.runs.pop(run_id)
        run.closed = True
        run.active = None
        for slot in run.slots:
            if slot.state is SlotState.ACTIVE:
                slot.state = SlotState.DRAINING if slot.requests else SlotState.FREE
            if self.base is not None:  # belongs to the base from now on, under a new salt
                slot.version, slot.checksum, slot.install_seq = None, "", self.next_install_seq()
                slot.receipt = None
        run.ring.notify()
