"""Coming generation batches, requested while the trainer trains on the present one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from learner.utils.threads import start
from shared.rollouts import Completion

Prompts = list[list[int]]


@dataclass(frozen=True)
class _Coming:
    prompts: Prompts
    outcome: Future[tuple[list[Completion], float]]


class Prefetcher:
    """A cache of batches that are known to come. What it holds is used only for the very prompts that were requested.

    Attributes:
        last_seconds: how long it took to fetch the batch that was taken last.
        mismatches: batches that were requested with other prompts than the trainer then asked for.

    Args:
        prompts_of: generation batch -> token ids of its rows on this rank [B][P]; called on the trainer's thread.
        fetch: batch, prompts -> completions in row order; called on a thread of its own.
        last_batch: the last generation batch of the training.
        warn: told once that what is read ahead is of no use.
    """

    def __init__(
        self,
        prompts_of: Callable[[int], Prompts],
        fetch: Callable[[int, Prompts], list[Completion]],
        *,
        last_batch: int,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._prompts_of, self._fetch, self._last_batch, self._warn = prompts_of, fetch, last_batch, warn
        self._coming: dict[int, _Coming] = {}
        self._requested = -1
        self._clock = _BusyClock()
        self.last_seconds = 0.0
        self.mismatches = 0

    @property
    def busy_seconds(self) -> float:
        """For how long at least one batch was being fetched."""
        return self._clock.seconds

    def request(self, first: int, last: int) -> None:
        """Request the batches from `first` to `last` that have not been requested, and that will be trained on."""
        for batch in range(max(first, self._requested + 1), min(last, self._last_batch) + 1):
            prompts = self._prompts_of(batch)
            # Not joined at exit: an interrupted training must not wait for completions that nobody wants any more.
            outcome = start(partial(self._timed, batch, prompts), f"rollouts-{batch}")
            self._coming[batch] = _Coming(prompts, outcome)
            self._requested = batch

    def take(self, batch: int, prompts: Prompts) -> list[Completion] | None:
        """Wait for the completions of a batch; None if these prompts of it were not requested.

        Raises:
            LockstepError: what made the request fail.
        """
        coming = self._coming.get(batch)
        if coming is None:
            return None
        if coming.prompts != prompts:
            del self._coming[batch]
            self.mismatches += 1
            if self.mismatches == 1:
                self._warn(
                    f"generation batch {batch} was read ahead with other prompts than the trainer asks for: its order "
                    "of prompts is not that of its sampler, so nothing is gained by max_staleness (said once)"
                )
            return None
        completions, self.last_seconds = coming.outcome.result()
        for old in [known for known in self._coming if known <= batch]:
            del self._coming[old]
        return completions

    def _timed(self, batch: int, prompts: Prompts) -> tuple[list[Completion], float]:
        started = time.monotonic()
        with self._clock:
            return self._fetch(batch, prompts), time.monotonic() - started


class _BusyClock:
    """Seconds for which at least one of several threads was inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._since, self._seconds = 0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        with self._lock:
            return self._seconds + (time.monotonic() - self._since if self._inside else 0.0)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.monotonic()
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._seconds += time.monotonic() - self._since
