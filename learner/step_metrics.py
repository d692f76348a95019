"""The figures of a run: one report per optimizer step, and a summary."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from learner.protocols import Trainer
from learner.rewards.scorer import Rewards
from learner.rollouts.dynamic_sampling import DynamicSampling
from learner.rollouts.generation import RemoteRollouts
from learner.rollouts.mismatch import Mismatch
from shared.weights import PushReceipt


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimizer step, in wall-clock seconds.

    Attributes:
        lag: mean lag of the samples of the generation batch, in generation batches.
        wait_seconds: for which the trainer waited for completions.
        reward_wait_seconds: for which the trainer waited for rewards (None: TRL computes them itself).
        idle_seconds: for which this rank was reading nothing ahead from the server (None: it never does).
        rollout_tokens_per_second: of the last generation batch, while it was being generated.
        logprob_gap: None where not proven.
        drift: of the generation batch the step trained on; None without importance correction.
        servers_up, servers: rollout servers that serve the present version, and all that are known.
        pause_seconds: for which no request of the slowest server was decoding because of the push.
        update_lost: of the optimizer's step, by rounding (see `learner.adapters.rounding`); None where nothing is rounded.
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
    update_lost: float | None = None


class Figures:
    """Counts what happens under a trainer.

    Attributes:
        pushes: of the whole run, without those of step 0 and of recoveries.
        reports: one per optimizer step that this process made.
        listeners: called with each report.
        drift: of the last generation batch, None without importance correction.
        rewards: where they are computed in workers.
        dynamic: where groups are replaced.
    """

    def __init__(self, trainer: Trainer, rollouts: RemoteRollouts) -> None:
        self._trainer, self._rollouts = trainer, rollouts
        self.rewards: Rewards | None = None
        self.dynamic: DynamicSampling | None = None
        self.pushes = 0
        self.reports: list[StepReport] = []
        self.drift: Mismatch | None = None
        self.listeners: list[Callable[[StepReport], None]] = []
        self._server_tokens: dict[str, int] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """A step begins now."""
        self._started = time.perf_counter()
        self._waited, self._busy = self._rollouts.stats.wait_seconds, self._busy_seconds()
        self._reward_waited = self.rewards.wait_seconds if self.rewards else 0.0

    def add(
        self, *, push_seconds: float, receipt: PushReceipt, logprob_gap: float | None, update_lost: float | None = None
    ) -> StepReport:
        """A step has ended with a push."""
        self.pushes += 1
        stats, trainer, pool = self._rollouts.stats, self._trainer, self._rollouts.dispatcher.pool
        seconds = time.perf_counter() - self._started
        idle = None
        if self._rollouts.ahead is not None:
            idle = max(seconds - (self._busy_seconds() - self._busy), 0.0)
        report = StepReport(
            step=trainer.step,
            max_steps=trainer.max_steps,
            reward=self._metric("reward"),
            reward_std=self._metric("reward_std"),
            completion_length=self._metric("completions/mean_length"),
            completion_tokens=stats.completion_tokens,
            lag=stats.last_lag,
            wait_seconds=stats.wait_seconds - self._waited,
            idle_seconds=idle,
            push_seconds=push_seconds,
            push_bytes=receipt.bytes,
            pause_seconds=receipt.pause_seconds,
            rollout_tokens_per_second=stats.last_tokens / max(stats.last_seconds, 1e-9),
            logprob_gap=logprob_gap,
            seconds=seconds,
            drift=self.drift,
            reward_wait_seconds=self.rewards.wait_seconds - self._reward_waited if self.rewards else None,
            servers_up=len(pool.up()),
            servers=len(pool.replicas),
            update_lost=update_lost,
        )
        self.restart_clock()
        logged = {
            "push_seconds": push_seconds,
            "push_bytes": receipt.bytes,
            "lag": report.lag,
            "logprob_gap": logprob_gap,
            "rollout_tokens_per_second": report.rollout_tokens_per_second,
            "wait_seconds": report.wait_seconds,
            "reward_wait_seconds": report.reward_wait_seconds,
            "server_idle_seconds": idle,
            "regenerated": stats.regenerated,
            "servers_up": report.servers_up,
            "pause_seconds": receipt.pause_seconds,
            "update_lost": update_lost,
        }
        for name, value in logged.items():
            if value is not None:
                trainer.log(f"lockstep/{name}", float(value))
        if report.servers > 1:
            self._log_servers()
        self.reports.append(report)
        for listener in self.listeners:
            listener(report)
        return report

    def _log_servers(self) -> None:
        """Tokens that came from each server since the last step."""
        for url, replica in list(self._rollouts.dispatcher.pool.replicas.items()):
            total, before = replica.load.tokens, self._server_tokens.get(url, 0)
            since = total - before if total >= before else total  # it was forgotten and listed again
            self._trainer.log(f"lockstep/tokens_from/{url.split('://')[-1]}", float(since))
            self._server_tokens[url] = total

    def saw_mismatch(self, drift: Mismatch) -> None:
        """A generation batch's distance between the server's distribution and the trainer's."""
        self.drift = drift
        for name, value in asdict(drift).items():
            self._trainer.log(f"lockstep/drift_{name}", value)

    def counts(self) -> dict[str, int]:
        """Counts of the whole run, over all ranks. Collective."""
        stats = self._rollouts.stats
        local = [(stats.completions, stats.completion_tokens)]
        completions, tokens = (sum(column) for column in zip(*gather_object(local), strict=True))
        return {"pushes": self.pushes, "completions": completions, "completion_tokens": tokens}

    def restore(self, pushes: int, completions: int, completion_tokens: int) -> None:
        """Go on counting where a checkpoint was written."""
        self.pushes = pushes
        if self._trainer.accelerator.is_main_process:
            self._rollouts.stats.completions += completions
            self._rollouts.stats.completion_tokens += completion_tokens

    def summary(self) -> dict[str, Any]:
        """Figures of the training, over all ranks. Collective."""
        stats = self._rollouts.stats
        unscored = self.rewards.unscored.total() if self.rewards else 0
        replaced, kept = (self.dynamic.replaced, self.dynamic.kept) if self.dynamic else (0, 0)
        local = [(stats.lags, stats.regenerated, self._rollouts.dispatcher.capped_prompts, unscored, replaced, kept)]
        lags, regenerated, capped, unscored_rewards, degenerate_replaced, degenerate_kept = zip(
            *gather_object(local), strict=True
        )
        return {
            "steps": self._trainer.step,
            **self.counts(),
            "lags": {str(lag): n for lag, n in sorted(sum(lags, Counter()).items())},
            "regenerated": sum(regenerated),
            "capped_prompts": sum(capped),
            "unscored_rewards": sum(unscored_rewards),
            "degenerate_replaced": sum(degenerate_replaced),
            "degenerate_kept": sum(degenerate_kept),
            "wait_seconds": stats.wait_seconds,
            "max_drift_kl": max((r.drift.kl for r in self.reports if r.drift), default=None),
            "max_drift_clipped": max((r.drift.clipped for r in self.reports if r.drift), default=None),
            "max_update_lost": max((r.update_lost for r in self.reports if r.update_lost is not None), default=None),
            "push_seconds_median": statistics.median(r.push_seconds for r in self.reports) if self.reports else None,
        }

    def _busy_seconds(self) -> float:
        ahead = self._rollouts.ahead
        return ahead.prefetcher.busy_seconds if ahead is not None else 0.0

    def _metric(self, name: str) -> float | None:
        """TRL's latest value, or that of the step before where the generation batch is being reused."""
        value = self._trainer.latest(name)
        if value is not None:
            return value
        field = {"completions/mean_length": "completion_length"}.get(name, name)
        return getattr(self.reports[-1], field) if self.reports else None
