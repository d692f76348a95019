"""The invariants I1 to I6, checked on the servers' own ports throughout the run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.chaos.reference import TOLERANCE, Reference, Version

PROBE = [5, 17, 99, 260, 41, 33, 270, 8, 120, 64, 7, 300]
PROMPTS = [[5, 17, 99], [260, 41, 33, 270, 8]]
_PROBE_TIMEOUT_S = 5.0
_EVERY_S = 0.7
#: How long a reachable server may serve nothing, or a version many steps old, while others receive pushes.
CATCH_UP_S, _MANY_STEPS = 90.0, 20


@dataclass
class Violation:
    """A broken invariant."""

    invariant: str
    what: str
    during: str
    seconds: float


@dataclass
class Checker:
    """Polls every server, and reads the learner's history.

    Args:
        urls: of the servers themselves, bypassing the proxy.
        receipts: returns the receipts that have reached the learner so far.
        history: the learner's metrics.jsonl.
        during: returns the name of the present fault.
        token: of the servers; empty: they need none.

    Attributes:
        checks: number of checks of each invariant.
        largest_gap, largest_share: of logprobs from a recomputation, in nats and of the tolerance.
        steps: time at which each step appeared in the history, and its line.
    """

    urls: list[str]
    run_id: str
    reference: Reference
    receipts: Callable[[], list[dict[str, Any]]]
    history: Path
    max_staleness: int
    during: Callable[[], str]
    token: str = ""
    violations: list[Violation] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)
    largest_gap: float = 0.0
    largest_share: float = 0.0
    steps: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._http = [self._client(url) for url in self.urls]
        self._scores: dict[str, list[float]] = {}  # by checksum
        self._served: dict[str, Version] = {}  # newest by epoch
        self._checksums: dict[Version, str] = {}
        self._seen: set[str] = set()
        self._near = [self._began] * len(self.urls)  # when each was last up to date, or unreachable
        self._threads = [threading.Thread(target=self._repeat, args=(i,), daemon=True) for i in range(len(self.urls))]
        self._threads.append(threading.Thread(target=self._follow_history, daemon=True))

    def start(self) -> None:
        """Start to check, on threads."""
        for thread in self._threads:
            thread.start()

    def watch(self, url: str) -> None:
        """Check another server, too, from now on."""
        self.urls.append(url)
        self._http.append(self._client(url))
        self._near.append(time.monotonic())
        self._threads.append(threading.Thread(target=self._repeat, args=(len(self.urls) - 1,), daemon=True))
        self._threads[-1].start()

    def stop(self) -> None:
        """Check one last time, and end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def violated(self, invariant: str, what: str) -> None:
        """Record and print a violation."""
        with self._lock:
            self.violations.append(Violation(invariant, what, self.during(), time.monotonic() - self._began))
        print(f"VIOLATION of {invariant} ({self.during()}): {what}", flush=True)

    def require(self, invariant: str, holds: bool, what: str) -> None:
        """Count a check; record `what` if it fails."""
        with self._lock:
            self.checks[invariant] = self.checks.get(invariant, 0) + 1
        if not holds:
            self.violated(invariant, what)

    def _client(self, url: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=url, timeout=_PROBE_TIMEOUT_S, headers=headers, trust_env=False)

    def _repeat(self, index: int) -> None:
        while not self._stopping.wait(_EVERY_S):
            try:
                self.look(index)
            except (httpx.HTTPError, OSError):  # down or stopped: check its next response
                self._near[index] = time.monotonic()

    def look(self, index: int) -> None:
        """Check one server once."""
        floors: dict[str, Version] = {}
        for receipt in self.receipts():
            version = (receipt["fence"], receipt["step"])
            floors[receipt["epoch"]] = max(floors.get(receipt["epoch"], version), version)
            self._one_checksum(version, receipt["checksum"])
        http = self._http[index]
        state = http.get("/v1/state")
        if state.status_code != 200:
            self._near[index] = time.monotonic()
            return
        document = state.json()
        run = next((run for run in document["runs"] if run["run_id"] == self.run_id and run["version"]), None)
        served = (run["version"]["fence"], run["version"]["step"]) if run else None
        self._catches_up(index, served, max(floors.values(), default=None))
        if run is None:
            self.require("I2", document["epoch"] not in floors, f"server {index} has lost its run within an epoch")
            return
        assert served
        version = served
        self._one_checksum(version, run["checksum"])
        announced = self.reference.checksum(version)
        self.require("I3", announced in (None, run["checksum"]), f"{version} is served with other bytes than pushed")
        self._not_older(document["epoch"], version, floors, "state")
        self._generate(http, floors)
        self._score(http, floors)

    def _catches_up(self, index: int, served: Version | None, newest: Version | None) -> None:
        """Check that a server that came back, or missed a push, is brought up to date."""
        if newest is None or (served is not None and served >= (newest[0], newest[1] - _MANY_STEPS)):
            self._near[index] = time.monotonic()
        behind_s = time.monotonic() - self._near[index]
        self.require("catching up", behind_s < CATCH_UP_S, f"server {index} is at {served}, others at {newest}")
        if behind_s >= CATCH_UP_S:  # do not report it at every check
            self._near[index] = time.monotonic()

    def _one_checksum(self, version: Version, checksum: str) -> None:
        known = self._checksums.setdefault(version, checksum)
        self.require("I3", known == checksum, f"{version} has two checksums: {known} and {checksum}")

    def _not_older(self, epoch: str, version: Version, floors: dict[str, Version], route: str) -> None:
        """Check that a version is not older than those acknowledged or served before the request."""
        with self._lock:
            floor = max(floors.get(epoch, (0, 0)), self._served.get(epoch, (0, 0)))
            if route == "state":
                self._served[epoch] = max(floor, version)
        self.require("I2", version >= floor, f"{route} returns {version} in epoch {epoch} after {floor}")

    def _generate(self, http: httpx.Client, floors: dict[str, Version]) -> None:
        body = {
            "run_id": self.run_id,
            "prompts": [{"token_ids": ids} for ids in PROMPTS],
            "sampling": {"n": 2, "max_tokens": 12, "temperature": 1.0},
        }
        answer = http.post("/v1/generate", json=body)
        if answer.status_code != 200:
            return
        document = answer.json()
        for group in document["groups"]:
            for completion in group["completions"]:
                tokens, spans = completion["token_ids"], completion["spans"]
                ends = [0] + [span["end"] for span in spans]
                contiguous = [span["start"] for span in spans] == ends[:-1] and ends[-1] == len(tokens)
                valid = contiguous and all(span["version"] and span["end"] > span["start"] for span in spans)
                self.require("I1", valid, f"spans {spans} for {len(tokens)} tokens")
                for span in spans if valid else ():
                    version = (span["version"]["fence"], span["version"]["step"])
                    self._not_older(document["epoch"], version, floors, "generate")
                    start, end = span["start"], span["end"]
                    sequence, first = group["prompt_token_ids"] + tokens[:end], len(group["prompt_token_ids"]) - 1
                    positions = range(first + start, first + end)
                    self.equal(version, sequence, completion["logprobs"][start:end], positions)

    def _score(self, http: httpx.Client, floors: dict[str, Version]) -> None:
        answer = http.post("/v1/score", json={"run_id": self.run_id, "sequences": [PROBE]})
        if answer.status_code != 200:
            return
        document = answer.json()
        version, scores = (document["version"]["fence"], document["version"]["step"]), document["logprobs"][0]
        self._not_older(document["epoch"], version, floors, "score")
        tolerance = self.equal(version, PROBE, scores, range(len(scores))) or TOLERANCE
        checksum = self._checksums.get(version)
        if checksum is not None:
            before = self._scores.setdefault(checksum, scores)
            gap = max(abs(a - b) for a, b in zip(before, scores, strict=True))
            self.require("I3", gap <= tolerance, f"scores of {version} changed by {gap:.2e} while its bytes did not")

    def equal(
        self, version: Version, sequence: list[int], served: Sequence[float], positions: Sequence[int]
    ) -> float | None:
        """Check logprobs of the tokens behind these positions of a sequence against a recomputation.

        Returns the tolerance; None if that version is not stored any more.
        """
        with self._lock:  # one model for all threads
            own, tolerance = self.reference.logprobs(version, sequence), self.reference.tolerance
        if own is None:
            return None
        gap = (own[list(positions)] - torch.tensor(served)).abs().max().item()
        self.largest_gap = max(self.largest_gap, gap)
        self.largest_share = max(self.largest_share, gap / tolerance)
        self.require("I4", gap <= tolerance, f"logprobs of {version} differ by {gap:.2e} from a recomputation")
        return tolerance

    def _follow_history(self) -> None:
        """Read every step that the learner reports, also those of histories that were abandoned."""
        while True:
            last = self._stopping.is_set()
            lines = self.history.read_text(errors="replace").splitlines() if self.history.is_file() else []
            for line in lines:
                if line.endswith("}"):
                    self._saw_step(line)
            if last:
                return
            time.sleep(0.1)

    def _saw_step(self, line: str) -> None:
        if line in self._seen:
            return
        try:
            step = json.loads(line)
        except ValueError:  # incomplete so far, or truncated by a full disk
            return
        self._seen.add(line)
        self.steps.append((time.monotonic(), step))
        self.require("I6", step["lag"] <= self.max_staleness, f"step {step['step']} trained on lag {step['lag']}")
        gap = step["logprob_gap"]
        # In fewer bits the learner's proof has a tolerance of its own, beyond which it ends.
        proven = gap is not None and (gap <= TOLERANCE or not self.reference.exact)
        self.require("I4", proven, f"step {step['step']}: proof gap {gap}")
