"""A member of a job: a command on a node, and what is known of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.cluster.hosted import Command, Report
from learner.utils.processes import ending


@dataclass(eq=False)
class Member:
    """A hosted command of a job.

    Attributes:
        restarts: how often Ray starts it again where its node is gone; -1: always.
        leaves: resources of its bundle that it does not take.
        report: the last one.
        lost: nothing is heard of it.
        gone: why nothing will be, though it has not ended: what Ray says.
        done: nothing more will be reported.
    """

    name: str
    command: Command
    group: Any
    bundle: int
    restarts: int
    leaves: Sequence[str] = ()
    actor: Any = None
    report: Report = field(default_factory=lambda: Report("", ""))
    lost: bool = False
    gone: str = ""
    was_ready: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def end(self, patience_s: float | None = None) -> None:
        """Ask it to end, with `patience_s` seconds to do so by itself; None: those of its command."""
        with contextlib.suppress(Exception):  # it cannot be reached: whether it is gone is found elsewhere
            self.actor.end.remote(patience_s)

    @property
    def fate(self) -> str:
        """How its command ended, and what it said last, which is why; or that it is gone."""
        if self.gone:
            began = self.report.life
            how = f"on {self.report.node} is gone" if began else "cannot be started on the cluster"
            return f"{self.name} {how}: {self.gone}"
        how, why = ending(self.report.status or 0), self.report.reason or "it said nothing"
        return f"{self.name} on {self.report.node} ended with {how}: {why}"
