"""A training run on a rollout server, seen from the learner: begin, push after every step, prove, count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from tqdm import tqdm

from learner.client import RolloutClient
from learner.config import LearnerConfig
from learner.drift import Drift
from learner.proof import SyncProof
from learner.publisher import Lease, Publisher, load_lease, save_lease
from learner.rollouts import RemoteRollouts
from shared.errors import ErrorCode, ErrorDetail, LockstepError
from shared.rollouts import GenerateRequest, PolicySelector, Prompt
from shared.sampling import SamplingParams
from shared.weights import PushReceipt, ServerState

PROBE_SEQUENCES, PROBE_PROMPT_TOKENS, PROBE_COMPLETION_TOKENS = 4, 64, 24


class Trainer(Protocol):
    """What a session needs of the trainer; see `learner.attach.TrainerSide`."""

    accelerator: Accelerator
    output_dir: Path

    @property
    def step(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def is_training(self) -> bool: ...
    def latest(self, metric: str) -> float | None: ...
    def log(self, metric: str, value: float) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimizer step, in wall-clock seconds; `logprob_gap` is None where not proven.

    `drift` is that of the generation batch the step trained on; None without importance correction.
    """

    step: int
    max_steps: int
    reward: float | None
    reward_std: float | None
    completion_length: float | None
    completion_tokens: int
    lag: int
    push_seconds: float
    push_bytes: int
    rollout_tokens_per_second: float
    logprob_gap: float | None
    seconds: float
    drift: Drift | None = None


class Session:
    """Everything that is built under a trainer: client, publisher, rollouts, proof, and the run's figures.

    `begin`, `after_step` and `ensure_served` are collective: every rank calls them, rank 0 acts.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: PeftModel,
        client: RolloutClient,
        state: ServerState,
        config: LearnerConfig,
        *,
        sampling: SamplingParams,
        prompts: list[list[int]],
        base_weights: str | None,
    ) -> None:
        self.trainer, self.model, self.client, self.config = trainer, model, client, config
        self.server = state
        # A server that merges has no base to show while any run lives; the proof at the first push covers it then.
        self.base_served = state.apply == "adapter" or not any(run.version for run in state.runs)
        self.prompts = prompts
        self.publisher = self._publisher(state, base_weights)
        self.continues = any(run.run_id == self.run_id for run in state.runs)
        self.rollouts = RemoteRollouts(
            client, sampling, state.max_model_len,
            version=lambda: self.publisher.version(trainer.step),
            barrier=self.ensure_served,
            recover=None if trainer.accelerator.num_processes > 1 else self._recover,
            is_training=lambda: trainer.is_training,
            warn=self.say,
            rank=trainer.accelerator.process_index,
        )  # fmt: skip
        self.proof: SyncProof | None = None
        self.canary_slope: float | None = None
        self.pushes = 0
        self.drift: Drift | None = None
        self.reports: list[StepReport] = []
        self.on_report: list[Callable[[StepReport], None]] = []
        self._step_started = time.perf_counter()

    def _publisher(self, state: ServerState, base_weights: str | None) -> Publisher:
        """All ranks hold the same lease, so that they ask for one version; rank 0 keeps it and pushes."""
        lease: list[Lease] = [load_lease(self.trainer.output_dir, self.config.run_id)]
        broadcast_object_list(lease, from_process=0)
        publisher = Publisher(
            self.client, self.model, lease[0], state,
            base_weights=base_weights, takeover=self.config.takeover, transport=self.config.transport,
            in_flight=self.config.in_flight, say=self.say,
        )  # fmt: skip
        if self.trainer.accelerator.is_main_process:
            save_lease(self.trainer.output_dir, publisher.lease)
        return publisher

    @property
    def run_id(self) -> str:
        """Name of the run on the server."""
        return self.publisher.lease.run_id

    def say(self, text: str) -> None:
        """Print on rank 0, above a progress bar."""
        if self.trainer.accelerator.is_main_process:
            tqdm.write(text)

    def begin(self) -> None:
        """Prove the base, push the initial adapter, prove it. Collective."""

        def start() -> None:
            sequences = self._probe()
            self.proof = SyncProof(
                self.client, self.model, sequences,
                served_dtype=self.server.dtype, tolerance=self.config.proof_tolerance,
                merged=self.server.apply == "merge",
            )  # fmt: skip
            if self.config.proof_canary and not self.continues and self.base_served:
                self.canary_slope = self._canary(self.proof)
            elif self.base_served:
                self.proof.check_base()
            step = self.trainer.step
            self.publisher.push(step)
            self.proof.check(self.publisher.version(step))

        self._on_main(start)
        self._step_started = time.perf_counter()

    def after_step(self) -> StepReport:
        """Push the step just made and wait until it is served; prove it where that is due. Collective."""
        step, steps = self.trainer.step, self.trainer.max_steps

        def publish() -> tuple[PushReceipt, float, float | None]:
            receipt = self.publisher.push(step)
            every = self.config.proof_every
            due = step <= 2 or step == steps or (every > 0 and step % every == 0)
            gap = self.proof.check(receipt.version).max_gap if due and self.proof else None
            return receipt, self.publisher.seconds[-1], gap

        receipt, seconds, gap = self._on_main(publish)
        self.pushes += 1
        return self._report(receipt, seconds, gap)

    def ensure_served(self) -> None:
        """Barrier: the trainer's step is what the server serves, else it is pushed. Collective."""
        step = self.trainer.step
        self._on_main(lambda: self.publisher.ensure(step))

    def saw_drift(self, drift: Drift) -> None:
        """A generation batch's distance between the server's distribution and the trainer's."""
        self.drift = drift
        for name, value in asdict(drift).items():
            self.trainer.log(f"lockstep/drift_{name}", value)

    def summary(self) -> dict[str, Any]:
        """Figures of the training, over all ranks; step 0 is not among the pushes. Collective."""
        reports, stats = self.reports, self.rollouts.stats
        counts = [(stats.completions, stats.completion_tokens, stats.capped_prompts)]
        completions, tokens, capped = (sum(column) for column in zip(*gather_object(counts), strict=True))
        return {
            "run_id": self.run_id,
            "steps": self.trainer.step,
            "pushes": self.pushes,
            "completions": completions,
            "completion_tokens": tokens,
            "max_logprob_gap": self.proof.max_gap if self.proof else None,
            "logprob_tolerance": self.proof.last.tolerance if self.proof and self.proof.last else None,
            "canary_slope": self.canary_slope,
            "push_seconds_median": statistics.median(r.push_seconds for r in reports) if reports else None,
            "capped_prompts": capped,
            "max_drift_kl": max((r.drift.kl for r in reports if r.drift), default=None),
            "max_drift_clipped": max((r.drift.clipped for r in reports if r.drift), default=None),
        }

    def _report(self, receipt: PushReceipt, push_seconds: float, gap: float | None) -> StepReport:
        stats, trainer = self.rollouts.stats, self.trainer
        report = StepReport(
            step=trainer.step, max_steps=trainer.max_steps,
            reward=self._metric("reward"), reward_std=self._metric("reward_std"),
            completion_length=self._metric("completions/mean_length"),
            completion_tokens=stats.completion_tokens, lag=0,
            push_seconds=push_seconds, push_bytes=receipt.bytes,
            rollout_tokens_per_second=stats.last_tokens / max(stats.last_seconds, 1e-9),
            logprob_gap=gap, seconds=time.perf_counter() - self._step_started, drift=self.drift,
        )  # fmt: skip
        self._step_started = time.perf_counter()
        logged = {"push_seconds": push_seconds, "push_bytes": receipt.bytes, "lag": 0.0, "logprob_gap": gap,
                  "rollout_tokens_per_second": report.rollout_tokens_per_second}  # fmt: skip
        for name, value in logged.items():
            if value is not None:
                trainer.log(f"lockstep/{name}", float(value))
        self.reports.append(report)
        for listener in self.on_report:
            listener(report)
        return report

    def _metric(self, name: str) -> float | None:
        """TRL's latest value, or that of the step before where the generation batch is being reused."""
        value = self.trainer.latest(name)
        if value is not None:
            return value
        field = {"completions/mean_length": "completion_length"}.get(name, name)
        return getattr(self.reports[-1], field) if self.reports else None

    def _recover(self) -> None:
        self.client.wait_ready(self.config.ready_timeout_s)
        self.publisher.ensure(self.trainer.step)

    def _probe(self) -> list[list[int]]:
        """Prompts of the task, each with a greedy completion: text like the policy will see."""
        distinct = list(dict.fromkeys(tuple(p[-PROBE_PROMPT_TOKENS:]) for p in self.prompts))[:PROBE_SEQUENCES]
        room = self.rollouts.max_model_len - max(map(len, distinct))
        if room < 1:
            return [list(p) for p in distinct]
        sampling = SamplingParams(temperature=0.0, max_tokens=min(PROBE_COMPLETION_TOKENS, room))
        asked = [Prompt(token_ids=list(p)) for p in distinct]
        policy: PolicySelector = "base" if self.base_served else "latest"
        answer = self.client.generate(GenerateRequest(prompts=asked, sampling=sampling, policy=policy))
        return [[*g.prompt_token_ids, *g.completions[0].token_ids] for g in answer.groups]

    def _canary(self, proof: SyncProof) -> float | None:
        lease = Lease(f"{self.run_id[:57]}.canary", self.publisher.lease.secret, 0)
        state = self.client.state()
        canary = Publisher(
            self.client,
            self.model,
            lease,
            state,
            base_weights=self.publisher.base_weights,
            takeover=self.config.takeover,
            transport="http",
        )
        try:
            return proof.canary(lambda: canary.push(0).version)
        except LockstepError as error:
            if error.code is not ErrorCode.NO_FREE_RUN:
                raise
            # The real run will hardly find a place either; its own push says so, and needs no canary to say
            # it.
            self.say(f"no free run for the canary: {error}")
            return None
        finally:
            if canary.receipts:
                self.client.delete_run(lease.run_id, lease.secret)

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Run on rank 0; its result, or its error, reaches every rank, so that none waits in vain."""
        accelerator = self.trainer.accelerator
        outcome: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                outcome = [action()]
            except LockstepError as error:
                if accelerator.num_processes == 1:
                    raise
                outcome = [error.body().error]
        broadcast_object_list(outcome, from_process=0)
        if isinstance(outcome[0], ErrorDetail):
            raise LockstepError(outcome[0].code, outcome[0].message, **outcome[0].detail)
        return outcome[0]
