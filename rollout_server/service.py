"""What the routes work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rollout_server.api.idempotency import Answers
from rollout_server.engine.admission import Admission
from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import POLICY_MODEL, EngineProxy, openai_lora_request
from rollout_server.installs.installer import Installer
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from shared.rollouts import PolicyRequest
from shared.weights import ServerState


@dataclass(frozen=True)
class Service:
    """Lives from warm-up to shutdown."""

    settings: ServerSettings
    proxy: EngineProxy
    runs: RunTable
    served: ServerState
    installer: Installer
    epoch: str
    openai_models: Any
    exclusive: Exclusive
    answers: Answers

    def state(self) -> ServerState:
        """The answer of `/v1/state`."""
        now = {
            "ready": not self.proxy.errored,
            "draining": self.proxy.capacity.draining,
            "asleep": self.proxy.asleep,
            "runs": [run.state() for run in self.runs.runs.values()],
        }
        return self.served.model_copy(update=now)

    async def reached(self, request: PolicyRequest) -> None:
        """Wait for the step the request asks for."""
        if request.min_step is not None:
            await self.runs.get(request.run_id).wait_for_step(request.min_step, request.wait_s)

    async def admit(self, request: PolicyRequest) -> Admission:
        """Bind a request to what is served."""
        await self.runs.admitting()
        return self.proxy.admit(request)

    def list_policies(self) -> None:
        """Show the runs as models on vLLM's OpenAI routes: `policy` where there is one, `policy:RUN_ID` always."""
        names = [f"{POLICY_MODEL}:{run_id}" for run_id, run in self.runs.runs.items() if run.active]
        if len(names) == 1:
            names.insert(0, POLICY_MODEL)
        listed = self.openai_models.lora_requests
        listed.clear()
        listed.update({name: openai_lora_request(name) for name in names})
