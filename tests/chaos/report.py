"""Results: injected faults and the time to recover from each."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.chaos.world import Training

_started = time.monotonic()


@dataclass
class Record:
    """One fault.

    Attributes:
        lasted: seconds until the fault was over.
        recovery: seconds from then until the end of a step that began after it; None: there was no such step.
        learner_restarts: restarts of the learner meanwhile.
    """

    fault: str
    server: int
    injected: bool
    lasted: float = 0.0
    recovery: float | None = None
    learner_restarts: int = 0
    violations: int = 0
    note: str = ""

    def __str__(self) -> str:
        if not self.injected:
            return f"{self.fault}: not injected, {self.note}"
        recovered = "no recovery" if self.recovery is None else f"next step after {self.recovery:.1f} s"
        restarts = f", learner restarted {self.learner_restarts} times" if self.learner_restarts else ""
        return f"{self.fault}: {self.lasted:.1f} s, {recovered}{restarts}"


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"chaos {time.monotonic() - _started:6.0f} s: {text}", flush=True)


def table(records: list[Record], world: Training, seconds: float) -> tuple[str, bool]:
    """Return a Markdown table, and whether the run passed: without violations, and with every fault injected."""
    checker = world.checker
    rows = [
        "",
        "| fault | injected | next step after, median / max | learner restarts | violations |",
        "| --- | --- | --- | --- | --- |",
    ]
    injected = [record for record in records if record.injected]
    for name in sorted({record.fault for record in injected}):
        of_kind = [record for record in injected if record.fault == name]
        times = [record.recovery for record in of_kind if record.recovery is not None]
        took = f"{statistics.median(times):.1f} / {max(times):.1f} s" if times else "-"
        restarts, violations = (sum(getattr(r, what) for r in of_kind) for what in ("learner_restarts", "violations"))
        rows.append(f"| {name} | {len(of_kind)} | {took} | {restarts} | {violations} |")
    times = [record.recovery for record in injected if record.recovery is not None]
    took = f"{statistics.median(times):.1f} / {max(times):.1f} s" if times else "-"
    rows.append(
        f"| all | {len(injected)} | {took} | {sum(r.learner_restarts for r in injected)} | {len(checker.violations)} |"
    )
    checks = ", ".join(f"{name} {count}" for name, count in sorted(checker.checks.items()))
    rows += [
        "",
        f"seed {world.options.seed}, {world.options.steps} steps, {world.options.servers} server(s), "
        f"{seconds:.0f} s; checks: {checks}; largest logprob gap {checker.largest_gap:.1e}, "
        f"{checker.largest_share:.0%} of its tolerance",
    ]
    if world.options.broadcast:
        rows.append(f"{world.broadcasts()} pushes were broadcast")
    ends = [(status, words) for _, status, words in world.learner.exits if status]
    endings = Counter(words if status > 0 else f"signal {-status}" for status, words in ends)
    rows += [f"the learner ended {count} times with: {words}" for words, count in endings.most_common()]
    skipped = Counter(f"{record.fault}: {record.note}" for record in records if not record.injected)
    rows += [f"not injected {count} times, {what}" for what, count in skipped.items()]
    rows += [f"VIOLATION of {v.invariant} at {v.seconds:.0f} s, {v.during}: {v.what[:500]}" for v in checker.violations]
    rows.append("0 violations" if not checker.violations else f"{len(checker.violations)} violations")
    return "\n".join(rows), not checker.violations and bool(records) and len(injected) == len(records)
