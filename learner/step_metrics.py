"""Metrics of a run: one report per optimizer step, and a summary."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from learner.rollouts.generation import RemoteRollouts
from learner.rollouts.mismatch import Mismatch
from learner.run_dir.files import finite
from shared.weights import PushReceipt

logger = logging.getLogger("lockstep.metrics")

#: Warned of below.
_LEAST_EFFECTIVE = 0.5
#: Fields of a report that are logged under their own name.
_LOGGED = (
    "push_seconds",
    "push_bytes",
    "lag",
    "logprob_gap",
    "rollout_tokens_per_second",
    "train_tokens_per_second",
    "flops_utilisation",
    "wait_seconds",
    "reward_wait_seconds",
    "servers_up",
    "pause_seconds",
    "update_lost",
)


@dataclass(frozen=True)
class Proven:
    """What a proof of sync has measured on the probe, in nats; of the server with the largest mismatch.

    Attributes:
        logprob_gap: largest |served - own|; with its mean (signed), rms and 99th percentile.
        step_share: least share of the last step that a server serves, and its standard error; None: not known.
        proof_seconds: that the proof took; None: it failed.
    """

    logprob_gap: float
    logprob_gap_mean: float
    logprob_gap_rms: float
    logprob_gap_p99: float
    step_share: float | None
    step_share_error: float | None
    proof_seconds: float | None


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimizer step, in wall-clock seconds.

    Attributes:
        lag: mean staleness of the generation batch's samples, in generation batches.
        wait_seconds, reward_wait_seconds: for which the trainer waited for completions, for rewards (None: TRL's own).
        idle_seconds: for which no batch of this rank was being read ahead (None: reading ahead is off).
        rollout_tokens_per_second: of the last generation batch, while it was being generated.
        train_tokens_per_second: prompts and completions of this rank, while it was neither waiting nor pushing.
        flops_utilisation: share of this rank's peak bfloat16 FLOP/s in that time; None on CPUs and unknown devices.
        logprob_gap: largest mismatch on the probe; None where not proven.
        proven: all that the proof has measured.
        drift: mismatch of the generation batch that was trained on.
        servers_up, servers: rollout servers that serve the present version, and all that are known.
        pause_seconds: for which no request of the slowest server was decoding because of the push.
        update_lost: part of the step lost by rounding, see `learner.adapters.rounding`; None where nothing is rounded.
        error: why the training ended with this step, which was not pushed, or not proven.
    """

    step: int
    max_steps: int
    reward: float | None
    reward_std: float | None
    completion_length: float | None
    completion_tokens: int
    lag: float
    wait_seconds: float
    idle_seconds: float | None
    push_seconds: float
    push_bytes: int
    rollout_tokens_per_second: float
    logprob_gap: float | None
    seconds: float
    drift: Mismatch | None = None
    reward_wait_seconds: float | None = None
    servers_up: int = 1
    servers: int = 1
    pause_seconds: float = 0.0
    train_tokens_per_second: float = 0.0
    flops_utilisation: float | None = None
    update_lost: float | None = None
    proven: Proven | None = None
    error: str | None = None

    @property
    def train_seconds(self) -> float:
        """For which the trainer was neither waiting nor pushing."""
        return _train_seconds(self.seconds, self.wait_seconds, self.reward_wait_seconds, self.push_seconds)


def _train_seconds(seconds: float, waited: float, reward_waited: float | None, pushing: float) -> float:
    return seconds - waited - (reward_waited or 0.0) - pushing


class StepMetrics:
    """Counts what happens under a trainer.

    Attributes:
        pushes: of the complete run, without those of step 0 and of recoveries.
        reports: one per optimizer step that this process made; `listeners` are called with each.
        mismatch: of the last generation batch; None before the first.
    """

    def __init__(self, rollouts: RemoteRollouts) -> None:
        self._rollouts, self._trainer, self._pool = rollouts, rollouts.trainer, rollouts.dispatcher.pool
        self.pushes = 0
        self.reports: list[StepReport] = []
        self.mismatch: Mismatch | None = None
        self.listeners: list[Callable[[StepReport], None]] = []
        self._server_tokens: dict[str, int] = {}
        self._warned = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to time a step."""
        rewards, prefetcher = self._rollouts.rewards, self._rollouts.prefetcher
        self._started, self._waited = time.perf_counter(), self._rollouts.stats.wait_seconds
        self._busy = prefetcher.busy_seconds if prefetcher else 0.0
        self._reward_waited = rewards.wait_seconds if rewards else 0.0

    def end_step(
        self,
        *,
        push_seconds: float,
        receipt: PushReceipt | None,
        proven: Proven | None,
        update_lost: float | None = None,
        error: str | None = None,
    ) -> StepReport:
        """Report, log and count a step that has ended with a push, or the training with an error."""
        self.pushes += receipt is not None
        stats, trainer = self._rollouts.stats, self._trainer
        rewards, prefetcher = self._rollouts.rewards, self._rollouts.prefetcher
        seconds = time.perf_counter() - self._started
        waited = stats.wait_seconds - self._waited
        reward_waited = rewards.wait_seconds - self._reward_waited if rewards else None
        tokens = (stats.last_tokens + stats.last_prompt_tokens) * trainer.schedule.batches_per_step
        speed = tokens / max(_train_seconds(seconds, waited, reward_waited, push_seconds), 1e-9)
        report = StepReport(
            step=trainer.step,
            max_steps=trainer.max_steps,
            reward=self._latest("reward", "reward"),
            reward_std=self._latest("reward_std", "reward_std"),
            completion_length=self._latest("completions/mean_length", "completion_length"),
            completion_tokens=stats.completion_tokens,
            lag=stats.last_staleness,
            wait_seconds=waited,
            idle_seconds=max(seconds - (prefetcher.busy_seconds - self._busy), 0.0) if prefetcher else None,
            push_seconds=push_seconds,
            push_bytes=receipt.bytes if receipt else 0,
            pause_seconds=receipt.pause_seconds if receipt else 0.0,
            rollout_tokens_per_second=stats.last_tokens / max(stats.last_seconds, 1e-9),
            logprob_gap=proven.logprob_gap if proven else None,
            proven=proven,
            seconds=seconds,
            drift=self.mismatch,
            reward_wait_seconds=reward_waited,
            servers_up=len(self._pool.up()),
            servers=len(self._pool.replicas),
            train_tokens_per_second=speed,
            flops_utilisation=trainer.utilisation(speed),
            update_lost=update_lost,
            error=error,
        )
        self.restart_clock()
        self._log(report)
        self.reports.append(report)
        for listener in self.listeners:
            listener(report)
        return report

    def _log(self, report: StepReport) -> None:
        logged = {name: getattr(report, name) for name in _LOGGED}
        logged |= asdict(report.proven) if report.proven else {}
        stats = self._rollouts.stats
        logged |= {"server_idle_seconds": report.idle_seconds, "regenerated": stats.regenerated}
        logged["unscored_tokens"] = stats.unscored_tokens
        for url, replica in list(self._pool.replicas.items()) if report.servers > 1 else ():
            total, before = replica.load.tokens, self._server_tokens.get(url, 0)
            since = total - before if total >= before else total  # it was forgotten and listed again
            logged[f"tokens_from/{url.split('://')[-1]}"] = since
            self._server_tokens[url] = total
        for name, value in logged.items():
            if value is not None:
                self._trainer.log(f"lockstep/{name}", float(value))

    def saw_mismatch(self, mismatch: Mismatch) -> None:
        """Record the mismatch of a generation batch."""
        self.mismatch = mismatch
        for name, value in asdict(mismatch).items():
            self._trainer.log(f"lockstep/drift_{name}", value)
        effective = mismatch.effective_sample_size
        if effective < _LEAST_EFFECTIVE and not self._warned:
            self._warned = True
            logger.warning(
                "importance ratios leave %.0f %% of a batch's samples effective: the longer completions are, the less "
                "remains of ratios of complete sequences. Set vllm_importance_sampling_mode=token_truncate, or make "
                "completions shorter, samples fresher, or both sides' dtypes the same (warned of once, logged as "
                "lockstep/drift_effective_sample_size)",
                100 * effective,
            )

    def counts(self) -> dict[str, int]:
        """Return the counts of the complete run, over all ranks. Collective."""
        stats = self._rollouts.stats
        ranks = gather_object([(stats.completions, stats.completion_tokens)])
        completions, tokens = map(sum, zip(*ranks, strict=True))
        return {"pushes": self.pushes, "completions": completions, "completion_tokens": tokens}

    def restore(self, pushes: int, completions: int, completion_tokens: int) -> None:
        """Continue to count from a checkpoint."""
        self.pushes = pushes
        if self._trainer.accelerator.is_main_process:
            self._rollouts.stats.completions += completions
            self._rollouts.stats.completion_tokens += completion_tokens

    def summary(self) -> dict[str, Any]:
        """Return the metrics of the training, over all ranks. Collective."""
        stats, rewards, dynamic = self._rollouts.stats, self._rollouts.rewards, self._rollouts.dynamic_sampling
        local = {
            "regenerated": stats.regenerated,
            "unscored_tokens": stats.unscored_tokens,
            "capped_prompts": self._rollouts.dispatcher.capped_prompts,
            "unscored_rewards": rewards.unscored.total() if rewards else 0,
            "degenerate_replaced": dynamic.replaced if dynamic else 0,
            "degenerate_kept": dynamic.kept if dynamic else 0,
            **(self._rollouts.agents.totals() if self._rollouts.agents else {}),
        }
        ranks = gather_object([(stats.staleness, local)])
        staleness = sum((counter for counter, _ in ranks), Counter[int]())
        mismatches = [r.drift for r in self.reports if r.drift]
        proofs = [r.proven for r in self.reports if r.proven]
        return {
            "steps": self._trainer.step,
            **self.counts(),
            "lags": {str(batches): n for batches, n in sorted(staleness.items())},
            **{name: sum(counts[name] for _, counts in ranks) for name in local},
            "wait_seconds": stats.wait_seconds,
            "max_logprob_gap_rms": max((p.logprob_gap_rms for p in proofs), default=None),
            "proof_seconds": sum(p.proof_seconds or 0.0 for p in proofs),
            "max_drift_kl": max((m.kl for m in mismatches), default=None),
            "max_drift_clipped": max((m.clipped for m in mismatches), default=None),
            "min_effective_sample_size": min((m.effective_sample_size for m in mismatches), default=None),
            "max_update_lost": max((r.update_lost for r in self.reports if r.update_lost is not None), default=None),
            "push_seconds_median": statistics.median(r.push_seconds for r in self.reports) if self.reports else None,
        }

    def _latest(self, metric: str, field: str) -> float | None:
        """Return TRL's latest value, None for NaN; that of the step before where the generation batch is reused."""
        value = self._trainer.latest(metric)
        return getattr(self.reports[-1], field) if value is None and self.reports else finite(value)
