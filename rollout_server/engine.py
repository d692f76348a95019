"""The one door to the engine. Salt, LoRARequest and version are set here and nowhere else.

Every route goes through `EngineDoor`, vLLM's own OpenAI routes included: they believe it to be the engine client.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from rollout_server.slots import Run, RunTable, Slot
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import PolicyRequest, VersionSpan
from shared.weights import WeightVersion

#: Model name of the trained adapter on vLLM's OpenAI routes. `policy:RUN_ID` names one of several runs.
POLICY_MODEL = "policy"

_CLOSED = {
    "add_lora", "remove_lora", "pin_lora", "sleep", "wake_up", "pause_generation", "resume_generation",
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
    "update_weight_version", "collective_rpc", "scale_elastic_ep",
}  # fmt: skip


class Engine(Protocol):
    """What the door needs of vLLM's AsyncLLM; unit tests stand in for it."""

    errored: bool

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator: ...

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
    ) -> list[Any]: ...


class Admission:
    """A request's place on one version: all it samples comes from there, however long it runs.

    It holds its slot from the moment it exists until `release`, so that no push can refill the slot in between.
    """

    def __init__(self, engine: Engine, run: Run | None = None, slot: Slot | None = None) -> None:
        self._engine, self._run, self._slot = engine, run, slot
        self.version: WeightVersion | None = slot.version if slot else None
        self._salt = slot.salt if slot else ""
        if run and slot:
            run.acquire(slot)

    def release(self) -> None:
        """Let go of the slot; calling it again does nothing."""
        run, self._run = self._run, None
        if run and self._slot:
            run.release(self._slot)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def spans(self, tokens: int) -> list[VersionSpan]:
        """Spans of a completion of `tokens` tokens: one, because a request never changes its slot."""
        return [VersionSpan(version=self.version, start=0, end=tokens)] if tokens else []

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's `generate` on this version. `prompt`: one of vLLM's prompt dicts."""
        if self._slot is not None:
            prompt = _salted(prompt, self._salt)
            kwargs["lora_request"] = _lora_request(self._slot)
        async with aclosing(self._engine.generate(prompt, sampling_params, request_id, **kwargs)) as stream:
            async for output in stream:
                yield output


class EngineDoor:
    """AsyncLLM as seen by every route. Attributes that are not here are AsyncLLM's own, but for those that would
    change weights or adapters behind the server's back.
    """

    def __init__(self, engine: Any, runs: RunTable) -> None:
        self._engine = engine
        self._runs = runs

    def __getattr__(self, name: str) -> Any:
        if name in _CLOSED:
            raise LockstepError(
                ErrorCode.INVALID_REQUEST,
                f"{name} is closed on a rollout server: it would change weights behind the learner's back; "
                "push adapters with PUT /v1/runs/{run_id}/adapter",
            )
        return getattr(self._engine, name)

    def admit(self, request: PolicyRequest) -> Admission:
        """Bind a request to the version that serves it from now on.

        Raises:
            LockstepError: `unknown_run`, `version_not_active`.
        """
        if request.policy == "base":
            return Admission(self._engine)
        wanted = request.policy if isinstance(request.policy, WeightVersion) else None
        run = self._runs.get(wanted.run_id if wanted else request.run_id)
        return self._admit_run(run, wanted)

    def _admit_run(self, run: Run, wanted: WeightVersion | None = None) -> Admission:
        slot = run.active
        if slot is None or (wanted is not None and slot.version != wanted):
            served = slot.version if slot else "nothing yet"
            raise LockstepError(
                ErrorCode.VERSION_NOT_ACTIVE,
                f"run {run.run_id} serves {served}, not {wanted or 'any adapter'}",
                served=slot.version.model_dump() if slot and slot.version else None,
            )
        return Admission(self._engine, run, slot)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's engine-client call, as its OpenAI routes make it: a LoRA name is a run, no LoRA is the base."""
        if lora_request is None:
            admission = Admission(self._engine)
        else:
            admission = self._admit_run(self._runs.get(run_of_model(lora_request.lora_name)))
        with admission:
            async with aclosing(admission.generate(prompt, sampling_params, request_id, **kwargs)) as outputs:
                async for output in outputs:
                    yield output

    def encode(self, *args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        """Pooling requests reach the base model only."""
        if lora_request is not None:
            raise LockstepError(ErrorCode.INVALID_REQUEST, "pooling requests are served by the base model only")
        return self._engine.encode(*args, **kwargs)

    async def call_workers(self, method: str, *args: Any, timeout: float) -> list[Any]:
        """Run a method of `worker.AdapterWorker` on every worker; one answer each. For this server's own use.

        Raises:
            LockstepError: `install_failed` when they do not all answer within `timeout` seconds.
        """
        try:
            return await self._engine.collective_rpc(method, timeout=timeout, args=args)
        except TimeoutError as error:
            raise LockstepError(
                ErrorCode.INSTALL_FAILED, f"the engine's workers did not answer {method} within {timeout:.0f} s"
            ) from error


def run_of_model(model: str) -> str | None:
    """The run that an OpenAI model name means; None for plain `policy`."""
    return model.removeprefix(POLICY_MODEL).removeprefix(":") or None


def openai_lora_request(model: str) -> Any:
    """What vLLM's model list holds for a policy; the door puts the real slot in its place."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(model, 1, "/in-memory")


def _lora_request(slot: Slot) -> Any:
    from vllm.lora.request import LoRARequest

    # Name and id of a slot never change; what tells installs apart is the salt.
    return LoRARequest(f"slot-{slot.slot_id}", slot.slot_id, "/in-memory")


def _salted(prompt: Any, salt: str) -> Any:
    """The prompt under a prefix-cache salt of this install (and the client's own, if it sent one)."""
    if not isinstance(prompt, dict):
        raise TypeError(f"the policy is reached with vLLM's prompt dicts, got {type(prompt).__name__}")
    own = prompt.get("cache_salt")
    return {**prompt, "cache_salt": f"{salt}:{own}" if own else salt}
