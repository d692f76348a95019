"""Thousands of requests to a running rollout server: checks of every response, and of the server after all of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from learner.servers.client import RolloutClient
from shared.weights import WeightVersion
from tests.fuzz.watch import health
from tests.integration.support import policy as P

#: Upper limit of any response time.
DEADLINE_S = 30.0
#: How long a server that did not answer may take to come back, before the next request is sent.
_RECOVERY_S = 150.0
PROBES = [[(7 * i + 3) % 500 + 3 for i in range(200)], [5, 17, 99, 260, 41, 33, 270, 8, 120, 64, 7, 300]]
#: Codes of status 503 that ask for a retry: no slot is free, or the server is draining. Others are failures.
SPECIFIED_503 = ("no_free_slot", "draining")


@dataclass
class Tally:
    """Counts of responses, and failures."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def requests(self) -> int:
        """Return the number of requests sent."""
        return sum(sum(counts.values()) for counts in self.statuses.values())

    def fail(self, what: str) -> None:
        """Record a failure; print the first of each kind."""
        kind = what.split(" to {")[0][:200]
        if not any(known.startswith(kind) for known in self.failures):
            print(f"fuzz: {what[:1500]}", flush=True)
        self.failures.append(what)


class Target:
    """A running server, and the weights that it must still serve after every campaign.

    Attributes:
        during: what the server is doing, for messages.
    """

    def __init__(self, url: str, tally: Tally, alive: Callable[[], bool] = lambda: True) -> None:
        self.url, self.tally, self.alive = url, tally, alive
        self.during = "nothing"
        self.http = httpx.Client(base_url=url, timeout=DEADLINE_S)
        self._address = (self.http.base_url.host, self.http.base_url.port or 80)
        self.client = RolloutClient(url)
        self.epoch = self.client.state().epoch
        self.served = self.look()

    def close(self) -> None:
        self.http.close()
        self.client.close()

    def look(self) -> dict[str, Any]:
        """Return version, checksum and install count of every run, and the exact logprobs of the probes."""
        state = self.client.state()
        runs: dict[str, Any] = {run.run_id: self._served_by(run) for run in state.runs if run.version}
        scored = {name: self.probe(name) for name in runs}
        scored["base"] = self.probe("base", policy="base")
        return {"runs": runs, "scored": scored}

    def probe(self, run_id: str, **policy: str) -> list[Any]:
        """Return logprobs of the probes under a run; None stands for NaN, which finite but huge weights can produce."""
        body = {"sequences": PROBES, **(policy or {"run_id": run_id})}
        return list(self.http.post("/v1/score", json=body).raise_for_status().json()["logprobs"])

    def served_version(self, run_id: str) -> Any:
        """Return version, checksum and install count of a run."""
        return self._served_by(self.client.run(run_id))

    @staticmethod
    def _served_by(run: Any) -> Any:
        return run.version, run.checksum, run.install_seq

    def expect_unchanged(self, after: str) -> None:
        """Check that the server is alive, can say so in all its ways, and serves the same as before."""
        self.during = f"the checks after {after}"
        try:
            for path in ("/ready", "/metrics", "/v1/state", "/v1/models"):
                if (status := self.http.get(path).status_code) != 200:
                    self.tally.fail(f"after {after}: {path} gives {status}")
            if self.http.get("/health").status_code != 200 or not self.alive():
                self.tally.fail(f"after {after}: the server is not healthy")
            if self.client.state().epoch != self.epoch:
                self.tally.fail(f"after {after}: the server has restarted")
            now = self.look()
        except Exception as error:
            self.tally.fail(f"after {after}: {type(error).__name__}: {error}")
            return
        if now["runs"] != self.served["runs"]:
            self.tally.fail(f"after {after}: served {now['runs']}, was {self.served['runs']}")
        for name, scores in self.served["scored"].items():
            if name not in now["scored"] or scores != now["scored"][name]:
                self.tally.fail(f"after {after}: the weights of {name} give other logprobs")

    def send(self, campaign: str, method: str, path: str, *, what: str = "", **request: Any) -> httpx.Response | None:
        """Send one request and judge the response; return None if there was none. `what`: shown for the request."""
        counts = self.tally.statuses.setdefault(campaign, Counter())
        about: Any = {"what": what} if what else request
        self.during = f"{campaign}: {method} {path[:80]} to {what or shown(request)}"
        started = time.monotonic()
        try:
            try:
                answer = self.http.request(method, path, **request)
            except (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError):
                # A server may close the connection after refusing a body.
                answer = self.http.request(method, path, **request)
        except (httpx.TransportError, httpx.InvalidURL, UnicodeError) as error:
            if not isinstance(error, httpx.LocalProtocolError | httpx.InvalidURL | UnicodeError):  # else: never sent
                counts[0] += 1
                self.tally.fail(f"{campaign}: {method} {path[:80]}: no answer: {error!r} to {shown(about)}")
                self.await_recovery()
            return None
        self.judge(campaign, method, path, answer.status_code, answer.text, time.monotonic() - started, about)
        return answer

    def await_recovery(self) -> None:
        """Wait until the server answers again, so that what breaks is what broke it.

        Raises:
            RuntimeError: it does not.
        """
        deadline = time.monotonic() + _RECOVERY_S
        while health(self._address, _RECOVERY_S) != 200:
            if time.monotonic() > deadline or not self.alive():
                raise RuntimeError(f"the server does not come back after {self.during}")
            time.sleep(0.5)

    def judge(
        self, campaign: str, method: str, path: str, status: int, text: str, seconds: float, request: Any
    ) -> None:
        """Count a response; record a failure for a 5xx other than a specified 503, or a slow response."""
        self.tally.statuses.setdefault(campaign, Counter())[status] += 1
        self.tally.slowest_s = max(self.tally.slowest_s, seconds)
        if status >= 500 and not (status == 503 and any(code in text for code in SPECIFIED_503)):
            self.tally.fail(f"{campaign}: {method} {path[:80]}: {status} {text[:300]} to {shown(request)}")
        if seconds > DEADLINE_S / 2:
            self.tally.fail(f"{campaign}: {method} {path[:80]}: answered after {seconds:.1f} s: {shown(request)}")


def shown(request: Any) -> str:
    """Return a shortened representation of a request."""
    if isinstance(request, dict):
        request = {key: value[:600] if isinstance(value, bytes | str) else value for key, value in request.items()}
    return repr(request)[:700]


def every(strategy: st.SearchStrategy[Any], examples: int, number: int, send: Callable[[Any], object]) -> None:
    """Send `examples` draws. Failures go to the tally, so nothing is shrunk or raised."""

    @seed(number)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(drawn: Any) -> None:
        send(drawn)

    one()


def pushed(target: Target, policy: Any, run_id: str) -> bytes:
    """Push a random adapter under `run_id` and return its blob."""
    P.randomize(policy, seed=11)
    data = P.blob(policy, WeightVersion(run_id=run_id, step=0), target.client.state().base.weights)
    target.client.push(run_id, [data], P.LEASE, takeover=True)
    target.served = target.look()
    return data


def json_bytes(body: Any) -> bytes:
    """Encode a body as a careless client does: with NaN, Infinity and lone surrogates."""
    return json.dumps(body).encode()


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Split a body for chunked encoding, without a content-length."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
