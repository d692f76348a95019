"""Table of runs: which exist, and which learner may push to them."""

from __future__ import annotations

import hmac

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

    def replaced_by(self, run_id: str, takeover: bool) -> str | None:
        """Return the run whose place `open` would give to `run_id`."""
        full = run_id not in self.runs and len(self._rings) == len(self.runs) == 1
        return next(iter(self.runs)) if full and takeover else None

    def get(self, run_id: str | None) -> Run:
        """Return the run of that name; without a name, the only one. Raises `unknown_run`."""
        if run_id is None and len(self.runs) == 1:
            return next(iter(self.runs.values()))
        if run_id is None or run_id not in self.runs:
            known = ", ".join(sorted(self.runs)) or "none yet: no adapter was pushed"
            raise UnknownRun(f"run_id {run_id!r} names no run of this server ({known})")
        return self.runs[run_id]

    def steps(self) -> dict[str, int]:
        """Return run id -> served step."""
        active = [(run_id, run.active) for run_id, run in self.runs.items()]
        return {run_id: slot.version.step for run_id, slot in active if slot and slot.version}

    def check_open(self, run_id: str, lease: str, takeover: bool) -> None:
        """Raise `lease_mismatch` or `no_free_run` if `open` would. Changes nothing."""
        run = self.runs.get(run_id)
        if run is not None:
            if not takeover and not hmac.compare_digest(run.lease.encode(), lease.encode()):
                raise LeaseMismatch(
                    f"another learner holds run {run_id}; stop it, or take the run over with --takeover"
                )
        elif self._free_ring() is None and self.replaced_by(run_id, takeover) is None:
            raise NoFreeRun(
                f"this server has no room for run {run_id}: it serves {', '.join(sorted(self.runs))}; "
                "end that run, take its place with --takeover, or start the server with --max-runs"
            )

    def open(self, run_id: str, lease: str, takeover: bool) -> Run:
        """Return the run to push to, a new one if there is room.

        `takeover` replaces the lease, or the only other run. Raises `lease_mismatch`, `no_free_run`.
        """
        self.check_open(run_id, lease, takeover)
        if replaced := self.replaced_by(run_id, takeover):
            self.close(replaced)
        run = self.runs.get(run_id)
        if run is None:
            ring = self._free_ring()
            assert ring is not None
            run = self.runs[run_id] = Run(run_id, lease, ring)
        run.lease = lease
        return run

    def _free_ring(self) -> Ring | None:
        taken = [run.ring for run in self.runs.values()]
        return next((ring for ring in self._rings if ring not in taken), None)

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
        run.ring.notify()
