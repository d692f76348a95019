"""Prometheus metrics of the rollout server, beside vLLM's own on `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from rollout_server.sessions.records import Counts, Sessions
from shared.errors import LockstepError
from shared.weights import PushReceipt

PUSHES = Counter("lockstep_pushes", "Adapter pushes by outcome (ok, repeated, or an error code)", ["outcome"])
PUSH_SECONDS = Histogram(
    "lockstep_push_seconds",
    "A push from its first byte to the new version serving",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
PUSH_BYTES = Counter("lockstep_push_bytes", "Adapter bytes installed")
PUSH_WAIT_SECONDS = Counter(
    "lockstep_push_wait_seconds", "For which pushes waited for a free slot, or (merge) for running requests to finish"
)
PAUSE_SECONDS = Counter("lockstep_pause_seconds", "For which no request was decoding because of a push")
SEQUENCES = Gauge("lockstep_sequences", "Sequences running or waiting, over all routes")
REQUESTS = Gauge("lockstep_requests", "Requests under way, but for those that only read")
REFUSED = Counter(
    "lockstep_refused",
    "Requests refused because there is too much to do (429), or nothing can be done (503)",
    ["status"],
)


class PolicySteps(Collector):
    """The step at which each run is served now; a run that ends leaves no series behind."""

    def __init__(self) -> None:
        self.served: Callable[[], dict[str, int]] = dict  # run id -> step

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "lockstep_policy_step", "Optimizer step of the version being served", labels=["run_id"]
        )
        for run_id, step in self.served().items():
            family.add_metric([run_id], step)
        yield family


POLICY_STEPS = PolicySteps()
REGISTRY.register(POLICY_STEPS)


class SessionCounts(Collector):
    """Sessions of agents, and what became of their calls."""

    def __init__(self) -> None:
        self.sessions: Sessions | None = None

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        sessions = self.sessions
        counts, taking_calls, tokens = (
            (sessions.counts, sessions.open_sessions, sessions.tokens) if sessions else (Counts(), 0, 0)
        )
        yield GaugeMetricFamily("lockstep_sessions", "Sessions of agents that take calls", value=taking_calls)
        yield GaugeMetricFamily("lockstep_session_tokens", "Tokens that all sessions hold", value=tokens)
        for name, text, value in (
            ("sessions_opened", "Sessions opened", counts.opened),
            ("session_calls", "Calls that sessions have recorded", counts.calls),
            ("session_calls_cut", "Calls in sessions whose client went away", counts.cut),
            ("session_forks", "Calls, or choices of one, that did not go on where a trajectory ended", counts.forks),
            ("session_calls_repaired", "Calls whose prompt was built on the recorded token ids", counts.repaired),
        ):
            yield CounterMetricFamily(f"lockstep_{name}", text, value=value)


SESSIONS = SessionCounts()
REGISTRY.register(SESSIONS)


@contextmanager
def counted_push() -> Iterator[Callable[[PushReceipt], None]]:
    """Count a push; call the yielded function with its receipt when it has succeeded."""
    started = time.monotonic()

    def succeeded(receipt: PushReceipt) -> None:
        PUSHES.labels("repeated" if receipt.repeated else "ok").inc()
        if not receipt.repeated:
            PUSH_SECONDS.observe(time.monotonic() - started)
            PUSH_BYTES.inc(receipt.bytes)
            PUSH_WAIT_SECONDS.inc(receipt.wait_seconds)
            PAUSE_SECONDS.inc(receipt.pause_seconds)

    try:
        yield succeeded
    except LockstepError as error:
        PUSHES.labels(error.code.value).inc()
        raise
