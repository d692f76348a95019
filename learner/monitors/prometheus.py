"""Prometheus metrics of the learner, served on `--metrics_port`."""

from __future__ import annotations

import logging
from collections import Counter as Counts
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.monitors.http_server import local_only, start_http_server
from learner.rollouts.generation import RolloutStats
from learner.run_dir.files import finite
from learner.servers.pool import ServerPool
from learner.step_metrics import StepReport

logger = logging.getLogger("lockstep.monitors")

NAMESPACE = "lockstep_learner"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STEP_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_LAGS = (0, 1, 2, 3, 4, 6, 8, 12, 16)

#: Gauges set at every step: field of StepReport -> name and documentation.
_STEPPED = {
    "step": ("step", "Optimizer steps done"),
    "max_steps": ("max_steps", "Optimizer steps of the complete training"),
    "reward": ("reward", "Mean reward of the last generation batch"),
    "reward_std": ("reward_std", "Standard deviation of the rewards of the last generation batch"),
    "completion_length": ("completion_length_tokens", "Mean length of completions"),
    "rollout_tokens_per_second": (
        "rollout_tokens_per_second",
        "Throughput of the servers while the last generation batch was generated",
    ),
    "train_tokens_per_second": (
        "train_tokens_per_second",
        "Prompts and completions of this rank, while it was neither waiting nor pushing",
    ),
    "flops_utilisation": (
        "flops_utilisation_ratio",
        "Share of this rank's peak bfloat16 FLOP/s while it trained; not on CPUs and unknown devices",
    ),
    "logprob_gap": ("logprob_gap_nats", "Largest difference of served and local logprobs at the last proof of sync"),
}
#: Gauges set by every proof of sync: field of Proven -> name and documentation.
_PROVEN = {
    "logprob_gap_rms": (
        "logprob_gap_rms_nats",
        "Rms of the differences of served and local logprobs at the last proof",
    ),
    "step_share": ("step_share_ratio", "Share of the last step in served logprobs, at the last proof that could tell"),
}
#: Gauges set at every step that measured them: field of Mismatch -> name and documentation.
_MISMATCH = {
    "delta": ("drift_nats", "Mean absolute difference of ln p(learner) and ln p(server) over sampled tokens"),
    "kl": ("drift_kl_nats", "KL from the server to the learner over sampled tokens, k3 estimator"),
    "clipped": ("drift_clipped_ratio", "Share of importance ratios that the correction clipped or dropped"),
    "effective_sample_size": (
        "effective_sample_ratio",
        "Share of a batch's samples that is left, by Kish, with the weights that importance ratios give them",
    ),
}
#: Gauges set from TRL's logs, every `logging_steps`: TRL's name -> name and documentation.
_LOGGED = {
    "loss": ("loss", "Loss, as logged by TRL"),
    "kl": ("kl_nats", "KL from the policy to the reference, as logged by TRL; only with beta > 0"),
    "entropy": ("entropy_nats", "Mean entropy of the policy over completion tokens"),
    "grad_norm": ("gradient_norm", "Gradient norm before clipping"),
    "learning_rate": ("learning_rate", "Learning rate"),
    "frac_reward_zero_std": ("flat_group_ratio", "Share of zero-variance groups (no learning signal)"),
    "completions/clipped_ratio": ("truncated_ratio", "Share of completions truncated at max_completion_length"),
    "eval_reward": ("eval_reward", "Mean reward of the last evaluation"),
}
#: Counters of what StepReport has for each step: field -> name and documentation.
_COUNTED = {
    "push_bytes": ("push_bytes", "Adapter bytes pushed to each server"),
    "pause_seconds": ("pause_seconds", "Time without any decoding request because of a push"),
    "wait_seconds": ("wait_seconds", "Time the trainer waited for completions: the bubble"),
    "reward_wait_seconds": ("reward_wait_seconds", "Time the trainer waited for rewards"),
    "idle_seconds": ("server_idle_seconds", "Time without rollouts running ahead on the servers"),
}


class LearnerMetrics(Collector):
    """All metrics of one learner process, in a registry of their own.

    Counters begin at 0 with each process, also in a resumed run.
    """

    def __init__(self, pool: ServerPool, *, run_id: str, model: str) -> None:
        self.registry, self._pool = CollectorRegistry(), pool
        self._values: dict[str, float] = {}
        self._lags, self._tokens, self._regenerated = Counts[int](), 0, 0
        gauge = partial(Gauge, namespace=NAMESPACE, registry=self.registry)
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        histogram = partial(Histogram, namespace=NAMESPACE, registry=self.registry)
        gauge("run_info", "The run being trained; always 1", ["run_id", "model"]).labels(run_id, model).set(1)
        self._functions = {
            "mean": gauge("reward_function", "Mean of one reward function, before its weight", ["function"]),
            "std": gauge("reward_function_std", "Standard deviation of one reward function", ["function"]),
        }
        self.registry.register(self)
        self._step_seconds = histogram("step_seconds", "Optimizer steps, waiting included", buckets=_STEP_SECONDS)
        pushes = "From the adapter's export to the last receipt"
        self._push_seconds = histogram("push_seconds", pushes, buckets=_SECONDS)
        self._lag = histogram("lag_batches", "Staleness of trained samples, in generation batches", buckets=_LAGS)
        self._counters = {field: counter(*metric) for field, metric in _COUNTED.items()}
        self._completion_tokens = counter("completion_tokens", "Tokens of the completions trained on")
        self._regenerations = counter("regenerated", "Samples generated again because they were too stale")

    def begin(self, step: int, max_steps: int, stats: RolloutStats) -> None:
        """Begin at the state of a run, whose earlier counts belong to another process."""
        self._set(_STEPPED, {"step": step, "max_steps": max_steps})
        self._tokens = stats.completion_tokens

    def stepped(self, report: StepReport, stats: RolloutStats) -> None:
        """Record an optimizer step."""
        values = asdict(report)
        self._set(_STEPPED, values)
        self._set(_PROVEN, values["proven"] or {})
        self._set(_MISMATCH, values["drift"] or {})
        for name, counter in self._counters.items():
            counter.inc(values[name] or 0.0)
        self._step_seconds.observe(report.seconds)
        self._push_seconds.observe(report.push_seconds)
        self._completion_tokens.inc(stats.completion_tokens - self._tokens)
        self._regenerations.inc(stats.regenerated - self._regenerated)
        for lag in (stats.staleness - self._lags).elements():
            self._lag.observe(lag)
        self._tokens, self._lags, self._regenerated = stats.completion_tokens, stats.staleness.copy(), stats.regenerated

    def logged(self, logs: Mapping[str, float | None]) -> None:
        """Record TRL's logs: means over the steps since its previous log, or an evaluation."""
        self._set(_LOGGED, logs)
        for name, value in logs.items():
            kind, _, function = name.partition("/")
            function, _, statistic = function.rpartition("/")
            if value is not None and kind == "rewards" and statistic in self._functions:
                self._functions[statistic].labels(function).set(value)

    def serve(self, host: str, port: int | None) -> None:
        """Serve `http://HOST:PORT/metrics` from a thread, until the process ends; nothing without a port.

        On the loopback it does not answer to pages in a browser.

        Raises:
            LockstepError: `invalid_request` if it cannot be listened on.
        """
        if not port:
            return
        start_http_server(local_only(make_wsgi_app(self.registry), host), host, port, "metrics_port")
        logger.info("metrics on http://%s:%d/metrics", host, port)

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, without a sample until their value is known: a missing evaluation is not one of 0."""
        for name, documentation in chain.from_iterable(
            table.values() for table in (_STEPPED, _PROVEN, _MISMATCH, _LOGGED)
        ):
            yield GaugeMetricFamily(f"{NAMESPACE}_{name}", documentation, self._values.get(name))
        gauge = partial(GaugeMetricFamily, labels=["server"])
        up = gauge(f"{NAMESPACE}_server_up", "1 if the server serves the current version, else 0")
        step = gauge(f"{NAMESPACE}_server_step", "Step of the version last pushed to the server")
        for replica in list(self._pool.replicas.values()):
            up.add_metric([replica.url], float(replica.up))
            if replica.receipt is not None:
                step.add_metric([replica.url], replica.receipt.version.step)
        yield from (up, step)

    def _set(self, table: Mapping[str, tuple[str, str]], values: Mapping[str, Any]) -> None:
        """Set the gauges of `table` from `values`; what is missing, None or not finite keeps its previous value."""
        for key, (name, _) in table.items():
            if (value := finite(values.get(key))) is not None:
                self._values[name] = value
