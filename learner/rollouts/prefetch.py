"""Request coming generation batches while the trainer trains on the present one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from learner.rollouts.schedule import Schedule
from learner.utils.threads import start
from shared.rollouts import Completion

#: What a batch is requested for: token ids of its prompts [B][P], and what else tells its rows apart ("": nothing).
Asked = tuple[list[list[int]], str]
logger = logging.getLogger("lockstep.rollouts")


@dataclass
class Prefetcher:
    """A cache of coming batches. Completions are used only for exactly what was requested.

    Args:
        asked_of: maps a generation batch to what this rank asks for; called on the trainer's thread.
        complete: maps a batch and what is asked to completions in row order; called on a thread of its own.
        max_staleness: how many generation batches old a sample's oldest weights may be.

    Attributes:
        last_seconds: how long the batch that was taken last took to generate.
        mismatches: batches whose prompts differed from those that the trainer then requested.
    """

    asked_of: Callable[[int], Asked]
    complete: Callable[[int, Asked], list[Completion]]
    schedule: Schedule
    max_staleness: int
    last_seconds: float = field(default=0.0, init=False)
    mismatches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._pending: dict[int, tuple[Asked, Future[tuple[list[Completion], float]]]] = {}
        self._requested = -1
        self._lock = threading.Lock()
        self._running, self._busy_since, self._busy_seconds = 0, 0.0, 0.0

    @property
    def busy_seconds(self) -> float:
        """Seconds for which at least one batch was being generated."""
        with self._lock:
            return self._busy_seconds + (time.monotonic() - self._busy_since if self._running else 0.0)

    def request(self, first: int, last: int) -> None:
        """Request the batches from `first` to `last` that have not been requested and will be trained on."""
        for batch in range(max(first, self._requested + 1), min(last, self.schedule.last_batch) + 1):
            asked = self.asked_of(batch)
            # Not joined at exit: an interrupted training must not wait for completions that are no longer needed.
            self._pending[batch] = asked, start(partial(self._timed, batch, asked), f"rollouts-{batch}")
            self._requested = batch

    def take(self, batch: int, asked: Asked) -> list[Completion] | None:
        """Wait for the completions of a batch; return None if something else was requested.

        Raises:
            LockstepError: the error of the request.
        """
        if batch not in self._pending:
            return None
        requested, outcome = self._pending[batch]
        if requested != asked:
            del self._pending[batch]
            self.mismatches += 1
            if self.mismatches == 1:
                logger.warning(
                    f"generation batch {batch} was read ahead with other prompts than the trainer requests: its order "
                    "of prompts is not that of its sampler, so nothing is gained by max_staleness (said once)"
                )
            return None
        completions, self.last_seconds = outcome.result()
        for old in [known for known in self._pending if known <= batch]:
            del self._pending[old]
        return completions

    def _timed(self, batch: int, asked: Asked) -> tuple[list[Completion], float]:
        started = time.monotonic()
        with self._lock:
            if not self._running:
                self._busy_since = started
            self._running += 1
        try:
            return self.complete(batch, asked), time.monotonic() - started
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._busy_seconds += time.monotonic() - self._busy_since
