"""What the server does for its routes, HTTP aside."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import POLICY_MODEL, EngineProxy
from rollout_server.installs.installer import Installer
from rollout_server.runs.slots import Run
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions
from shared.collective import Announcement, GroupInvitation
from shared.errors import InvalidRequest
from shared.weights import InFlight, PushReceipt, ServerState


@dataclass(frozen=True)
class Service:
    """Lives from warm-up to shutdown.

    Attributes:
        openai_state: what vLLM's own routes work with.
    """

    settings: ServerSettings
    served: ServerState
    runs: RunTable
    proxy: EngineProxy
    exclusive: Exclusive
    installer: Installer
    openai_state: Any

    def state(self) -> ServerState:
        """Return what the server is and serves at present."""
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
        receipt = await self.installer.push(run_id, lease, takeover, body, in_flight)
        self._list_models()
        return receipt

    async def broadcast(
        self, run_id: str, lease: str, announced: Announcement, in_flight: InFlight
    ) -> AsyncGenerator[PushReceipt | None, None]:
        """Install an adapter that comes by broadcast; see `Installer.broadcast`."""
        async with aclosing(self.installer.broadcast(run_id, lease, announced, in_flight)) as events:
            async for receipt in events:
                self._list_models()
                yield receipt

    async def join_group(self, run_id: str, lease: str) -> AsyncGenerator[GroupInvitation | None, None]:
        """Meet the run's learner in a collective group; see `BroadcastGroups.join`.

        Raises:
            LockstepError: also `unknown_run`, `lease_mismatch`.
        """
        async with aclosing(self.installer.groups.join(self._held_run(run_id, lease))) as events:
            async for invitation in events:
                yield invitation

    async def end_run(self, run_id: str, lease: str) -> None:
        """Forget a run and free its slots; see `Installer.end`.

        Raises:
            LockstepError: also `unknown_run`, `lease_mismatch`, `invalid_request` while it receives a push.
        """
        if self._held_run(run_id, lease).push_lock.locked():
            raise InvalidRequest(f"run {run_id} is receiving a push; stop its learner first")
        await self.installer.end(run_id)
        self._list_models()

    def _held_run(self, run_id: str, lease: str) -> Run:
        run = self.runs.get(run_id)
        self.runs.check_open(run_id, lease, takeover=False)
        return run

    def _list_models(self) -> None:
        """Show the runs as models on vLLM's routes: `policy` where there is one, `policy:RUN_ID` always."""
        names = [f"{POLICY_MODEL}:{run_id}" for run_id, run in self.runs.runs.items() if run.active]
        if len(names) == 1:
            names.insert(0, POLICY_MODEL)
        versions.list_models(self.openai_state, names)
