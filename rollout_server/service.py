"""Operations behind the routes, without HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import POLICY_MODEL, EngineProxy
from rollout_server.installs.installer import Installer
from rollout_server.runs.table import RunTable
from rollout_server.sessions.records import Sessions
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions
from shared.collective import Announcement, GroupInvitation
from shared.errors import InvalidRequest
from shared.weights import InFlight, PushReceipt, RunState, ServerState, TrainingEnd


@dataclass(frozen=True)
class Service:
    """Lives from warm-up to shutdown."""

    settings: ServerSettings
    served: ServerState
    runs: RunTable
    proxy: EngineProxy
    exclusive: Exclusive
    installer: Installer
    sessions: Sessions
    openai_state: Any  # of vLLM's own routes

    def state(self) -> ServerState:
        """Return the present state of the server."""
        present = {
            "ready": not self.proxy.errored,
            "draining": self.proxy.capacity.draining,
            "asleep": self.proxy.asleep,
            "runs": [run.state() for run in self.runs.runs.values()],
        }
        return self.served.model_copy(update=present)

    async def push(
        self, run_id: str, lease: str, takeover: bool, body: AsyncIterator[bytes], in_flight: InFlight
    ) -> PushReceipt:
        """Install an adapter that comes as one blob; see `Installer.push`."""
        try:
            return await self.installer.push(run_id, lease, takeover, body, in_flight)
        finally:  # what has failed after its flip is served
            self._list_models()

    async def broadcast(
        self, run_id: str, lease: str, announced: Announcement, in_flight: InFlight
    ) -> AsyncGenerator[PushReceipt | None, None]:
        """Install an adapter that comes by broadcast; see `Installer.broadcast`."""
        try:
            async with aclosing(self.installer.broadcast(run_id, lease, announced, in_flight)) as events:
                async for receipt in events:
                    yield receipt
        finally:
            self._list_models()

    def join_group(self, run_id: str, lease: str) -> AsyncGenerator[GroupInvitation | None, None]:
        """Meet the run's learner in a collective group; see `BroadcastGroups.join`.

        Raises:
            LockstepError: also `unknown_run`, `lease_mismatch`.
        """
        run = self.runs.get(run_id)
        self.runs.check_lease(run, lease)
        return self.installer.groups.join(run, lease)

    def finish_run(self, run_id: str, lease: str, ended: TrainingEnd) -> RunState:
        """Note that a run's training has ended; see `RunTable.finish`."""
        self.runs.finish(run_id, lease, ended.version, ended.keep_seconds)
        self._list_models()
        return self.runs.get(run_id).state()

    async def end_run(self, run_id: str, lease: str, takeover: bool = False) -> None:
        """Forget a run and free its slots; see `Installer.end`.

        Raises:
            LockstepError: also `unknown_run`, `lease_mismatch`, `invalid_request` while it receives a push.
        """
        run = self.runs.get(run_id)
        self.runs.check_end(run, lease, takeover)
        if run.ring.push_lock.locked():
            raise InvalidRequest(f"run {run_id} is receiving a push; stop its learner first")
        try:
            await self.installer.end(run_id, lease, takeover)
        finally:
            self._list_models()

    def _list_models(self) -> None:
        """Show the runs as models on vLLM's routes: `policy` where there is one, `policy:RUN_ID` always."""
        names = [f"{POLICY_MODEL}:{run_id}" for run_id, run in self.runs.runs.items() if run.active]
        if (default := self.runs.default()) is not None and default.active:
            names.insert(0, POLICY_MODEL)
        versions.list_models(self.openai_state, names)
