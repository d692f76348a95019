"""Collective groups of learners and workers, one for each run."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import NamedTuple

from rollout_server.ipc.client import Workers
from rollout_server.runs.slots import Run
from rollout_server.settings import ServerSettings
from shared.collective import GroupInvitation
from shared.errors import LeaseMismatch, NoGroup


class _Joined(NamedTuple):
    name: str
    lease: str


@dataclass
class BroadcastGroups:
    """At most one group for each run. A group that failed is left and never used again; a learner may join another."""

    workers: Workers
    settings: ServerSettings
    backend: str
    bind: str  # address that groups meet on: that of the HTTP server, or of the first worker's host
    _joined: dict[Run, _Joined] = field(default_factory=dict)

    def of(self, run: Run) -> str:
        """Return the name of the group that the run's learner is in; raises `no_group`."""
        if run not in self._joined:
            raise NoGroup(f"the learner of run {run.run_id} shares no collective group with this server")
        return self._joined[run].name

    async def join(self, run: Run, lease: str) -> AsyncGenerator[GroupInvitation | None, None]:
        """Form a group with the learner of that lease: yield its invitation, then None when all workers have joined.

        Nobody can reach the store in which they met any more then. Raises `timeout`, `install_failed`, or
        `lease_mismatch` if the run was taken over meanwhile; no group is left behind then.
        """
        self.leave(run)
        name, timeout, size = secrets.token_hex(8), self.settings.collective_timeout, len(self.workers) + 1
        common = {"group": name, "bind": self.bind, "timeout": timeout}
        try:
            hosting = await self.workers.begin_each("host_group", [common]).results(timeout)
            port = hosting[0]["port"]
            ranks = [{**common, "port": port, "rank": rank, "size": size} for rank in range(1, size)]
            call = self.workers.begin_each("join_group", ranks)
            yield GroupInvitation(
                group=name, host=self.workers.host, port=port, size=size, backend=self.backend, timeout_s=timeout
            )
            await call.results(timeout + 10.0)  # workers give up on their own after `timeout`
            await self.workers.begin_each("close_store", [{"group": name}]).results(timeout)
            if run.closed or run.lease != lease:
                raise LeaseMismatch(f"run {run.run_id} was taken over while its learner joined a group")
            self.leave(run)
            self._joined[run] = _Joined(name, lease)
            yield None
        except BaseException:  # the learner may have gone
            if self._joined.get(run) == _Joined(name, lease):
                del self._joined[run]
            self.workers.begin("leave_group", group=name)
            raise

    def leave(self, run: Run) -> None:
        """Leave the run's group, if it has one, even in the middle of a transfer."""
        if joined := self._joined.pop(run, None):
            self.workers.begin("leave_group", group=joined.name)

    def leave_lost(self) -> None:
        """Leave the groups with learners that hold their runs no longer."""
        for run in [run for run, joined in self._joined.items() if run.closed or run.lease != joined.lease]:
            self.leave(run)
