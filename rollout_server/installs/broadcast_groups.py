"""Collective groups of learners and workers, one for each run."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from rollout_server.ipc.client import Workers
from rollout_server.runs.slots import Run
from rollout_server.settings import ServerSettings
from shared.collective import GroupInvitation
from shared.errors import NoGroup


@dataclass
class BroadcastGroups:
    """At most one group for each run. A group that failed is left and never used again; a learner may join another."""

    workers: Workers
    settings: ServerSettings
    backend: str
    bind: str  # address that groups meet on, that of the HTTP server
    _joined: dict[Run, str] = field(default_factory=dict)

    def of(self, run: Run) -> str:
        """Return the name of the run's group; raises `no_group`."""
        if run not in self._joined:
            raise NoGroup(f"the learner of run {run.run_id} shares no collective group with this server")
        return self._joined[run]

    async def join(self, run: Run) -> AsyncGenerator[GroupInvitation | None, None]:
        """Form a group for the run: yield the learner's invitation, then None when all workers have joined.

        Raises `timeout` or `install_failed`; no group is left behind then.
        """
        self.leave(run)
        name, timeout, size = secrets.token_hex(8), self.settings.collective_timeout, len(self.workers) + 1
        common = {"group": name, "bind": self.bind, "timeout": timeout}
        try:
            hosting = await self.workers.begin_each("host_group", [common]).results(timeout)
            port = hosting[0]["port"]
            ranks = [{**common, "port": port, "rank": rank, "size": size} for rank in range(1, size)]
            call = self.workers.begin_each("join_group", ranks)
            yield GroupInvitation(group=name, port=port, size=size, backend=self.backend, timeout_s=timeout)
            await call.results(timeout + 10.0)  # workers give up on their own after `timeout`
        except BaseException:
            self.workers.begin("leave_group", group=name)
            raise
        self.leave(run)
        self._joined[run] = name
        for closed in [run for run in self._joined if run.closed]:
            self.leave(closed)
        yield None

    def leave(self, run: Run) -> None:
        """Leave the run's group, if it has one, even in the middle of a transfer."""
        if name := self._joined.pop(run, None):
            self.workers.begin("leave_group", group=name)
