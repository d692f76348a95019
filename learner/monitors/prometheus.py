"""Prometheus metrics of the learner, on a port of their own: `--metrics_port`."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.rollouts.generation import RolloutStats
from learner.run_dir.files import finite
from learner.servers.pool import ServerPool
from learner.step_metrics import StepReport
from shared.errors import InvalidRequest

PREFIX = "lockstep_learner_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STEP_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_LAGS = (0, 1, 2, 3, 4, 6, 8, 12, 16)

#: Gauges that are set at every step, and what they are.
_STEPPED = {
    "step": "Optimizer steps done",
    "max_steps": "Optimizer steps of the whole training",
    "reward": "Mean reward of the last generation batch",
    "reward_std": "Standard deviation of the rewards of the last generation batch",
    "completion_length_tokens": "Mean length of completions",
    "rollout_tokens_per_second": "Of the last generation batch, while it was being generated",
    "drift_nats": "Mean absolute difference of ln p(learner) and ln p(server) over sampled tokens",
    "drift_kl_nats": "KL from the server to the learner over sampled tokens, k3 estimator",
    "drift_clipped_ratio": "Share of importance ratios that the correction clipped or dropped",
    "logprob_gap_nats": "Largest difference of served and own logprobs at the last proof of sync",
}
#: Gauges that are set from TRL's logs, every `logging_steps`: name in TRL's logs -> ours, and what it is.
_LOGGED = {
    "loss": ("loss", "Loss, as TRL logs it"),
    "kl": ("kl_nats", "KL from the policy to the reference, as TRL logs it; only with beta > 0"),
    "entropy": ("entropy_nats", "Mean entropy of the policy at its completions' tokens"),
    "grad_norm": ("gradient_norm", "Norm of the gradient before it is clipped"),
    "learning_rate": ("learning_rate", "Learning rate"),
    "frac_reward_zero_std": ("flat_group_ratio", "Share of groups whose rewards do not vary: they teach nothing"),
    "completions/clipped_ratio": ("truncated_ratio", "Share of completions that max_completion_length cut off"),
    "eval_reward": ("eval_reward", "Mean reward of the last evaluation"),
}


class LearnerMetrics:
    """All metrics of one learner process, in a registry of their own.

    Counters begin at 0 with the process, whatever a resumed run had counted before.
    """

    def __init__(self, pool: ServerPool, *, run_id: str, model: str) -> None:
        self.registry = CollectorRegistry()
        self._seen, self._tokens = Counts[int](), 0
        self._regenerated_seen = 0
        run = self._labelled("run_info", "The run that is being trained; always 1", "run_id", "model")
        run.labels(run_id, model).set(1)
        self._function = self._labelled("reward_function", "Mean of one reward function, before its weight", "function")
        self._function_std = self._labelled("reward_function_std", "Its standard deviation", "function")
        self._gauges = _Gauges({**_STEPPED, **dict(_LOGGED.values())})
        self.registry.register(self._gauges)
        self._step_seconds = self._histogram("step_seconds", "Optimizer steps, with all they waited for", _STEP_SECONDS)
        self._push_seconds = self._histogram("push_seconds", "From the adapter's export to the last receipt", _SECONDS)
        self._lag = self._histogram("lag_batches", "Lag of the samples trained on, in generation batches", _LAGS)
        self._push_bytes = self._counter("push_bytes", "Adapter bytes pushed to each server")
        self._pause = self._counter("pause_seconds", "For which no request was decoding because of a push")
        self._wait = self._counter("wait_seconds", "For which the trainer waited for completions: the bubble")
        self._reward_wait = self._counter("reward_wait_seconds", "For which the trainer waited for rewards")
        self._idle = self._counter("server_idle_seconds", "For which nothing was being read ahead from the servers")
        self._completion_tokens = self._counter("completion_tokens", "Tokens of the completions trained on")
        self._regenerated = self._counter("regenerated", "Samples generated again because they lagged too much")
        self.registry.register(_Servers(pool))

    def begin(self, step: int, max_steps: int, stats: RolloutStats) -> None:
        """What was counted until now belongs to an earlier process."""
        self._gauges.set(step=step, max_steps=max_steps)
        self._tokens = stats.completion_tokens

    def stepped(self, report: StepReport, stats: RolloutStats) -> None:
        """A step has ended."""
        self._gauges.set(
            step=report.step,
            max_steps=report.max_steps,
            reward=report.reward,
            reward_std=report.reward_std,
            completion_length_tokens=report.completion_length,
            logprob_gap_nats=report.logprob_gap,
            rollout_tokens_per_second=report.rollout_tokens_per_second,
        )
        if drift := report.drift:
            self._gauges.set(drift_nats=drift.delta, drift_kl_nats=drift.kl, drift_clipped_ratio=drift.clipped)
        self._step_seconds.observe(report.seconds)
        self._push_seconds.observe(report.push_seconds)
        self._push_bytes.inc(report.push_bytes)
        self._pause.inc(report.pause_seconds)
        self._wait.inc(report.wait_seconds)
        self._reward_wait.inc(report.reward_wait_seconds or 0.0)
        self._idle.inc(report.idle_seconds or 0.0)
        self._completion_tokens.inc(stats.completion_tokens - self._tokens)
        self._regenerated.inc(stats.regenerated - self._regenerated_seen)
        for lag, count in (stats.staleness - self._seen).items():
            for _ in range(count):
                self._lag.observe(lag)
        self._tokens, self._seen = stats.completion_tokens, stats.staleness.copy()
        self._regenerated_seen = stats.regenerated

    def logged(self, logs: Mapping[str, float | None]) -> None:
        """TRL has logged: means over the steps since it did so last, or an evaluation."""
        for name, value in logs.items():
            if value is None:
                continue
            if name in _LOGGED:
                self._gauges.set(**{_LOGGED[name][0]: value})
            elif name.startswith("rewards/") and name.endswith("/mean"):
                self._function.labels(name.removeprefix("rewards/").removesuffix("/mean")).set(value)
            elif name.startswith("rewards/") and name.endswith("/std"):
                self._function_std.labels(name.removeprefix("rewards/").removesuffix("/std")).set(value)

    def serve(self, host: str, port: int) -> None:
        """Answer on `http://HOST:PORT/metrics` from a thread, until the process ends.

        Raises:
            LockstepError: `invalid_request` if that cannot be listened on.
        """
        try:
            start_http_server(port, host, registry=self.registry)
        except (OSError, OverflowError) as error:
            raise InvalidRequest(
                f"metrics_port {port}: cannot listen on {host}:{port} ({error}); give another one, or leave it out"
            ) from error

    def _labelled(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    """Values that are not there, rather than 0, until they are known: no evaluation is not a bad one."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts, self._values = texts, dict[str, float]()

    def set(self, **values: float | None) -> None:
        """What is None, or no number, keeps the value before."""
        self._values.update({name: known for name, value in values.items() if (known := finite(value)) is not None})

    def collect(self) -> Iterator[Metric]:
        for name, text in self._texts.items():
            yield GaugeMetricFamily(PREFIX + name, text, self._values.get(name))


class _Servers(Collector):
    """Every rollout server as it is when it is asked for, since servers come and go."""

    def __init__(self, pool: ServerPool) -> None:
        self._fleet = pool

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(PREFIX + "server_up", "1: serves the present version; 0: does not", labels=["server"])
        step = GaugeMetricFamily(PREFIX + "server_step", "Step of the version it was sent last", labels=["server"])
        for replica in list(self._fleet.replicas.values()):
            up.add_metric([replica.url], float(replica.up))
            if replica.receipt is not None:
                step.add_metric([replica.url], replica.receipt.version.step)
        yield up
        yield step
