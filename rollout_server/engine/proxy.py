"""Single entry point to the engine: salt, LoRARequest and version are set here and nowhere else.

Every route goes through `EngineProxy`, vLLM's own OpenAI routes included, which take it for the engine client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout_server.engine.admission import Admission, OutputTokens, SessionHold, overloaded
from rollout_server.engine.capacity import Capacity
from rollout_server.engine.uninterrupted import uninterrupted
from rollout_server.runs.slots import Recall, Run, Slot
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions, vision
from shared.errors import EngineDead, InternalError, InvalidRequest, LockstepError, VersionNotActive
from shared.messages import one_line
from shared.rollouts import PolicyRequest
from shared.sampling import SamplingParams
from shared.structured_outputs import check_structured_outputs
from shared.weights import WeightVersion

logger = logging.getLogger("lockstep.engine")

#: Model name of the trained adapter on vLLM's OpenAI routes. `policy:RUN_ID` names one of several runs.
POLICY_MODEL = "policy"

_RESUME_SECONDS = 10.0

_CLOSED = {
    "add_lora",
    "remove_lora",
    "pin_lora",
    "sleep",
    "wake_up",
    "pause_generation",
    "resume_generation",
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "update_weight_version",
    "collective_rpc",
    "scale_elastic_ep",
}


class SessionCalls(Protocol):
    """The session that a call belongs to: a `sessions.records.Session`."""

    def admit(self) -> Admission: ...

    def generate(
        self, admission: Admission, prompt: Any, sampling_params: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]: ...


@dataclass
class CallContext:
    """One HTTP request to vLLM's routes, which may become several requests to the engine."""

    wanted: WeightVersion | None = None  # the version that it insists on
    versions: dict[str, None] = field(default_factory=dict)  # it was admitted to, in order; `base` for the base model
    refusal: LockstepError | None = None  # why `EngineProxy` did not admit it
    rejection: LockstepError | None = None  # why vLLM did not take it; its routes say so, but for streams
    format: Any = None  # structured outputs that have been checked
    session: SessionCalls | None = None  # says what is sampled from, and how, and records it
    sequences: int = 0  # of it that are under way

    def take(self, sequences: int, capacity: Capacity) -> Callable[[], None]:
        """Count its sequences as under way; return a function that ends that.

        Raises:
            LockstepError: as `Capacity.take`; `too_large` where all of the request together could never be taken.
        """
        capacity.check_sequences(self.sequences + sequences)
        give_back = capacity.take(1, sequences)
        self.sequences += sequences

        def end() -> None:
            self.sequences -= sequences
            give_back()

        return end


#: Of the running task; None in our own routes.
CALL_CONTEXT: ContextVar[CallContext | None] = ContextVar("lockstep_call", default=None)


def in_session() -> bool:
    """Return whether the running task is a call of a session."""
    call = CALL_CONTEXT.get()
    return call is not None and call.session is not None


class EngineProxy:
    """AsyncLLM as seen by every route. Attributes that are not here are AsyncLLM's own, but for those that would
    change weights or adapters behind the server's back.
    """

    def __init__(self, engine: Any, runs: RunTable, capacity: Capacity | None = None) -> None:
        self._engine = engine
        self.runs = runs
        self._given_up: LockstepError | None = None
        self.capacity = capacity or Capacity(ServerSettings())
        self.outputs = 0  # of the engine so far
        self.held = 0  # pauses under way that the engine has agreed to
        self.asleep = False
        self.turn_tokenizer: Any = None  # the one of the thread of `turns`
        self.image_limits: Any = None  # `generation.images.ImageLimits` of a model that sees images
        self.media_tokens: list[int] = []  # of the model, seeing or not: never drawn, and in no prompt without a medium
        self._probe: asyncio.Future[None] | None = None
        self._resuming: set[asyncio.Future[None]] = set()
        self._still = asyncio.Lock()  # vLLM's resume ends every pause, not only the caller's

    def cuts(self, sampling: SamplingParams) -> bool:
        """Return whether tokens are kept from being drawn: by the sampling, or since they stand for media."""
        return sampling.truncates or bool(self.media_tokens)

    @property
    def errored(self) -> bool:
        """Whether nothing may be served any more."""
        return self._given_up is not None or self._engine.errored

    @property
    def dead_error(self) -> BaseException:
        """The reason for `errored`: this server's own, the engine's, or both, of which either may be the cause."""
        if self._given_up is None or not self._engine.errored:
            return self._given_up or self._engine.dead_error
        return EngineDead(f"{self._given_up.message}; the engine says: {one_line(self._engine.dead_error)}")

    def give_up(self, reason: LockstepError) -> None:
        """End this server, and every request with an error: the engine hangs, or cannot be trusted."""
        self._given_up = self._given_up or reason
        versions.fail_requests(self._engine)

    def __getattr__(self, name: str) -> Any:
        if name in _CLOSED:
            raise InvalidRequest(
                f"{name} is closed on a rollout server: it would change weights behind the learner's back; "
                "push adapters with PUT /v1/runs/{run_id}/adapter"
            )
        return getattr(self._engine, name)

    async def reached(self, request: PolicyRequest) -> None:
        """Wait for the step that a request asks for, before it takes any room.

        Raises:
            LockstepError: `unknown_run`, `step_not_reached`, `overloaded`, `draining`.
        """
        if request.min_step is not None:
            run = self.runs.get(request.run_id)
            await self.capacity.wait(run.wait_for_step(request.min_step, request.wait_s))

    def admit(self, request: PolicyRequest) -> Admission:
        """Bind a request to the version that serves it from now on.

        Raises:
            LockstepError: `unknown_run`, `version_not_active`, `base_not_served`.
        """
        if request.policy == "base":
            return self._admit_base()
        wanted = request.policy if isinstance(request.policy, WeightVersion) else None
        return self._admit_run(wanted.run_id if wanted else request.run_id, wanted)

    def _admit_base(self) -> Admission:
        self.runs.check_base_served()
        base = self.runs.base
        return Admission(self._engine, base, base.slots[0] if base else None, self._count_output)

    def _admit_run(self, run_id: str | None, wanted: WeightVersion | None) -> Admission:
        return Admission(self._engine, *self._serving(run_id, wanted), self._count_output)

    def _serving(self, run_id: str | None, wanted: WeightVersion | None) -> tuple[Run, Slot]:
        run = self.runs.get(run_id)
        slot = run.active
        if slot is None or (wanted is not None and slot.version != wanted):
            served = slot.version if slot else "nothing yet"
            raise VersionNotActive(
                f"run {run.run_id} serves {served}, not {wanted or 'any adapter'}",
                served=slot.version.model_dump() if slot and slot.version else None,
            )
        return run, slot

    def hold(self, request: PolicyRequest, on_recall: Callable[[Recall], None]) -> SessionHold | None:
        """Keep the version that serves a request now for the calls of a session; None for the base.

        Raises:
            LockstepError: as `admit`.
        """
        if request.policy == "base":
            self.runs.check_base_served()
            return None
        wanted = request.policy if isinstance(request.policy, WeightVersion) else None
        run, slot = self._serving(wanted.run_id if wanted else request.run_id, wanted)
        return SessionHold(run, slot, on_recall)

    def admit_held(self, hold: SessionHold) -> Admission:
        """Bind a request to the version that a session holds; raises `version_not_active` where it was overwritten."""
        if hold.slot.version != hold.version:
            raise VersionNotActive(
                f"the session began with {hold.version}, which a push has replaced (--apply merge): open sessions with "
                "follow, push with in_flight = keep, or run the episode again"
            )
        return Admission(self._engine, hold.run, hold.slot, self._count_output)

    def _count_output(self) -> None:
        self.outputs += 1

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Generate as vLLM's OpenAI routes ask for it: a LoRA name means a run, no LoRA the base.

        A call of a session samples from what the session says, whatever the model's name.
        """
        call = CALL_CONTEXT.get() or CallContext()
        with contextlib.ExitStack() as held:
            try:
                _check_format(sampling_params, call)
                if self.media_tokens:
                    vision.check_text(self._engine.model_config, prompt)
                held.callback(call.take(getattr(sampling_params, "n", 1), self.capacity))
                await self.runs.admitting()
                if call.session is not None:
                    admission = held.enter_context(call.session.admit())
                    _check_wanted(call.wanted, admission)
                    stream = call.session.generate(admission, prompt, sampling_params, **kwargs)
                else:
                    admission = held.enter_context(self._admit_model(lora_request, call.wanted))
                    stream = admission.generate(prompt, sampling_params, request_id, **kwargs)
                call.versions[str(admission.version or "base")] = None
                async with aclosing(stream) as outputs:
                    async for output in outputs:
                        yield output
            except LockstepError as error:
                call.refusal = error
                # vLLM's routes report this form in theirs, where it comes too late for an error response of ours.
                raise versions.http_error(error.status, str(error)) from error
            except versions.refusals() as error:  # its routes know their status
                call.rejection = InvalidRequest(one_line(error))
                raise
            except Exception as error:
                reason = error.__cause__ or error
                message = f"the engine failed ({type(reason).__name__}: {one_line(reason)}); the server's log says more"
                call.rejection = InternalError(message)
                raise

    def check_admission(self, n: int = 1, **kwargs: Any) -> None:
        """Check vLLM's limits for a route that is about to prepare a request of `n` sequences."""
        try:
            self.capacity.check_sequences(n)
            self._engine.check_admission(n, **kwargs)
        except Exception as error:
            refusal = overloaded(error) if isinstance(error, versions.overload_errors()) else error
            if not isinstance(refusal, LockstepError):
                raise
            if (call := CALL_CONTEXT.get()) is not None:
                call.refusal = refusal
            raise versions.http_error(refusal.status, str(refusal)) from refusal

    def note_missing(self, model: str) -> None:
        """Note for the running call why there is no such model, which vLLM's route is about to refuse."""
        call = CALL_CONTEXT.get()
        try:
            self.runs.check_model(model)
        except LockstepError as error:
            if call is not None:
                call.refusal = error

    def _admit_model(self, lora_request: Any, wanted: WeightVersion | None) -> Admission:
        if lora_request is not None:
            run_id = lora_request.lora_name.removeprefix(POLICY_MODEL).removeprefix(":") or None
            return self._admit_run(run_id, wanted)
        if wanted is not None:
            raise VersionNotActive(f"the model asked for is the base, not {wanted}; ask for {POLICY_MODEL}")
        return self._admit_base()

    def encode(self, *args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        """Refuse pooling requests to anything but the base model."""
        if lora_request is not None:
            raise InvalidRequest("pooling requests are served by the base model only")
        if self.runs.base is not None:
            raise InvalidRequest("--apply merge serves no pooling requests")
        return self._engine.encode(*args, **kwargs)

    @asynccontextmanager
    async def paused(self, *, clear_cache: bool) -> AsyncIterator[OutputTokens]:
        """Hold all running requests between two tokens; yield how many tokens each output has so far. With
        `clear_cache` they compute their KV again afterwards.

        Raises:
            TimeoutError: the engine did not agree to it.
        """
        async with self._still:
            try:
                async with asyncio.timeout(120.0):
                    await self._engine.pause_generation(mode="keep", clear_cache=clear_cache)
                self.held += 1
                try:
                    yield self.output_tokens()
                finally:
                    self.held -= 1
            finally:
                await uninterrupted(self._resume())

    async def _resume(self) -> None:
        # An engine that was stopped by a signal returns when it goes on; nobody else has to wait for that.
        resumed = asyncio.ensure_future(self._engine.resume_generation())
        resumed.add_done_callback(self._see_resumed)
        self._resuming.add(resumed)
        await asyncio.wait({resumed}, timeout=_RESUME_SECONDS)
        if resumed.done():
            resumed.result()

    def _see_resumed(self, resumed: asyncio.Future[None]) -> None:
        """Give up an engine that stays paused: it would answer nothing."""
        self._resuming.discard(resumed)
        if not resumed.cancelled() and (error := resumed.exception()) is not None and not self.errored:
            self.give_up(EngineDead(f"the engine did not go on after a pause: {type(error).__name__}: {error}"))

    async def put_to_sleep(self, level: int) -> None:
        """Hold all requests until `wake`, and let nobody pause meanwhile. `level`: vLLM's."""
        await self._still.acquire()
        self.asleep = True
        self.held += 1
        await self._engine.sleep(level, mode="keep")

    async def wake(self, level: int) -> None:
        """Go on after `put_to_sleep`."""
        await self._engine.wake_up(None if level else ["scheduling"])
        self.asleep = False
        self.held -= 1
        self._still.release()

    def probe(self, *, sampling: bool = True) -> None:
        """Have the engine answer, which counts as an output; no effect while the last probe goes on.

        Args:
            sampling: it has to sample a token, in a batch with what else it runs; else only to look up between two
                steps, which changes no batch.
        """
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._ask(sampling))

    async def _ask(self, sampling: bool) -> None:
        try:
            if sampling:
                await self._sample_one()
            else:
                await self._engine.is_sleeping()
                self._count_output()
        except Exception as error:
            logger.warning("the engine did not answer a probe: %s: %s", type(error).__name__, error)

    async def _sample_one(self) -> None:
        from vllm import SamplingParams

        prompt = {"type": "token", "prompt_token_ids": [0], "cache_salt": "lockstep:probe"}
        params = SamplingParams(max_tokens=1, detokenize=False)
        async for _ in self._engine.generate(prompt, params, f"probe-{uuid.uuid4().hex}"):
            self._count_output()

    def output_tokens(self) -> OutputTokens:
        """Return how many tokens every output under way has."""
        return versions.output_tokens(self._engine)

    def running(self) -> set[str]:
        """Return the ids of unfinished requests that the engine has received with all their outputs."""
        return versions.submitted_requests(self._engine)


def _check_wanted(wanted: WeightVersion | None, admission: Admission) -> None:
    if wanted not in (None, admission.version):
        raise VersionNotActive(f"the session samples from {admission.version or 'the base'}, not {wanted}")


def _check_format(sampling_params: Any, call: CallContext) -> None:
    """Check the structured outputs of a request of vLLM's routes, also those that they have made of its tools.

    Raises:
        LockstepError: `invalid_request`.
    """
    form = getattr(sampling_params, "structured_outputs", None)
    if form is None or form == call.format:
        return
    try:
        check_structured_outputs(
            json_schema=form.json,
            regex=form.regex,
            choice=form.choice,
            grammar=form.grammar,
            structural_tag=form.structural_tag,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    call.format = form
