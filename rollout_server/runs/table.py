"""Table of runs: which exist, which learner may push to them, and which of them give way to others."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rollout_server.runs.slots import Finished, Ring, Run, Slot, SlotState
from shared import wire
from shared.errors import BaseNotServed, LeaseMismatch, NoFreeRun, UnknownRun, VersionNotActive
from shared.weights import WeightVersion


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
        """Return the run of that name; without a name, the `default`. Raises `unknown_run`."""
        run = self.default() if run_id is None else self.runs.get(run_id)
        if run is not None:
            return run
        if not self.runs:
            raise UnknownRun('this server has no run yet: push an adapter first, or ask for the policy "base"')
        which = f"there is no run {run_id!r}" if run_id is not None else "several runs are served"
        raise UnknownRun(f"{which}: name one with run_id ({', '.join(sorted(self.runs))})")

    def check_model(self, name: str) -> None:
        """Raise `unknown_run` where a model's name, as vLLM's routes take it, means a run that there is not."""
        kind, _, run_id = name.partition(":")
        if kind == "policy" and self.get(run_id or None).active is None:
            raise UnknownRun(f"{name} has no adapter yet: push one first")

    def default(self) -> Run | None:
        """Return the run that is meant without a name: the only one in training, else the one that finished last."""
        training = [run for run in self.runs.values() if run.finished is None]
        if training:
            return training[0] if len(training) == 1 else None
        return max(self.runs.values(), key=lambda run: run.finished.at if run.finished else 0.0, default=None)

    def steps(self) -> dict[str, int]:
        """Return run id -> served step."""
        active = [(run_id, run.active) for run_id, run in self.runs.items()]
        return {run_id: slot.version.step for run_id, slot in active if slot and slot.version}

    def check_lease(self, run: Run, lease: str) -> None:
        """Raise `lease_mismatch` unless the learner of that lease holds the run."""
        if not hmac.compare_digest(run.lease.encode(), lease.encode()):
            raise LeaseMismatch(
                f"another learner holds run {run.run_id}: stop it, or take the run over ({wire.TAKEOVER_HEADER}: 1)"
            )

    def check_end(self, run: Run, lease: str, takeover: bool) -> None:
        """Raise `lease_mismatch` unless a holder of that lease may end the run; with `takeover`, anyone may."""
        if not (takeover or run.gives_way):
            self.check_lease(run, lease)

    def places(self, run_id: str, lease: str, takeover: bool) -> list[Ring]:
        """Return the slots that a push to `run_id` may go to; raises `lease_mismatch`, `no_free_run`. Changes nothing.

        For a new run: free ones, then those of runs that give way, the longest finished first.

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
        giving_way = [run for run in self.runs.values() if run.gives_way]
        giving_way.sort(key=lambda run: run.finished.at if run.finished else 0.0)
        if free or giving_way:
            return [*free, *(run.ring for run in giving_way)]
        if takeover and len(self._rings) == 1:
            return self._rings
        raise NoFreeRun(
            f"this server has no room for run {run_id}: it serves {', '.join(map(self._described, self.runs.values()))}"
            f", and was started with --max-runs {len(self._rings)}",
            max_runs=len(self._rings),
        )

    def _described(self, run: Run) -> str:
        left = run.finished.kept_until - time.monotonic() if run.finished else None
        return run.run_id if left is None else f"{run.run_id} (finished; kept for {left:.0f} s more)"

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
        run.lease, run.finished = lease, None

    def finish(self, run_id: str, lease: str, version: WeightVersion, keep_s: float) -> None:
        """Note that the run's training has ended with `version`. It goes on being served, by the same slots, until
        another run needs its place after `keep_s` seconds; a later push makes it a run in training again.

        Raises:
            LockstepError: `unknown_run`, `lease_mismatch`; `version_not_active`, so that a late word of a learner that
                ended does not end the training that has gone on since.
        """
        run = self.get(run_id)
        self.check_lease(run, lease)
        served = run.active.version if run.active else None
        if served != version:
            raise VersionNotActive(f"run {run_id} serves {served}, and did not end with {version}")
        now = time.monotonic()
        run.finished = Finished(now, now + keep_s)
        run.recall()

    def close(self, run_id: str) -> None:
        """Remove a run. Its running requests finish; then its slots are free for other runs."""
        run = self.runs.pop(run_id)
        run.closed = True
        run.active = None
        run.recall()
        for slot in run.slots:
            if slot.state is SlotState.ACTIVE:
                slot.state = SlotState.DRAINING if slot.held else SlotState.FREE
            if self.base is not None:  # belongs to the base from now on, under a new salt
                slot.version, slot.checksum, slot.install_seq = None, "", self.next_install_seq()
                slot.receipt = None
        run.ring.notify()
