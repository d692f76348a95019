"""Coming generation batches, requested while the trainer trains on the present one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass

from shared.errors import ErrorCode, LockstepError
from shared.rollouts import Completion

#: Errors that say the server has forgotten the run, or was away: pushing again may help.
RECOVERABLE = {ErrorCode.UNKNOWN_RUN, ErrorCode.VERSION_NOT_ACTIVE, ErrorCode.NOT_READY}
_RETRY_S = 0.5
_LOOK_S = 0.2

Prompts = list[list[int]]


@dataclass(frozen=True)
class _Coming:
    prompts: Prompts
    outcome: Future[tuple[list[Completion], float]]


class Prefetcher:
    """A cache of batches that are known to come. What it holds is used only for the very prompts that were requested.

    `last_seconds`: how long it took to fetch the batch that was taken last.

    Args:
        prompts_of: generation batch -> token ids of its rows on this rank [B][P]; called on the trainer's thread.
        fetch: batch, prompts -> completions in row order; called on a thread of its own.
        last_batch: the last generation batch of the training.
        recover: brings a server that restarted back to the trainer's weights. Called on the trainer's thread, where no
            optimizer step is under way; None where a single rank cannot do it.
        patience_s: how long a fetch that fails because the server is away is tried again.
    """

    def __init__(
        self, prompts_of: Callable[[int], Prompts], fetch: Callable[[int, Prompts], list[Completion]], *,
        last_batch: int, recover: Callable[[], None] | None = None, patience_s: float = 600.0,
    ) -> None:  # fmt: skip
        self._prompts_of, self._fetch, self._recover = prompts_of, fetch, recover
        self._last_batch, self._patience_s = last_batch, patience_s
        self._coming: dict[int, _Coming] = {}
        self._requested = -1
        self._away = threading.Event()
        self._closed = threading.Event()
        self._clock = _BusyClock()
        self.last_seconds = 0.0

    @property
    def busy_seconds(self) -> float:
        """For how long at least one batch was being fetched."""
        return self._clock.seconds

    def request(self, first: int, last: int) -> None:
        """Request the batches from `first` to `last` that have not been requested, and that will be trained on."""
        for batch in range(max(first, self._requested + 1), min(last, self._last_batch) + 1):
            prompts = self._prompts_of(batch)
            outcome: Future[tuple[list[Completion], float]] = Future()
            self._coming[batch] = _Coming(prompts, outcome)
            # Daemons: an interrupted training must not wait for completions that nobody wants any more.
            threading.Thread(
                target=self._run, args=(batch, prompts, outcome), name=f"rollouts-{batch}", daemon=True
            ).start()
            self._requested = batch

    def take(self, batch: int, prompts: Prompts) -> list[Completion] | None:
        """Wait for the completions of a batch; None if these prompts of it were not requested.

        Raises:
            LockstepError: what made the request fail.
        """
        coming = self._coming.get(batch)
        if coming is None or coming.prompts != prompts:
            return None
        while True:
            try:
                completions, self.last_seconds = coming.outcome.result(timeout=_LOOK_S)
            except NotYet:
                if self._away.is_set() and self._recover is not None:
                    self._recover()
                    self._away.clear()
                continue
            for old in [known for known in self._coming if known <= batch]:
                del self._coming[old]
            return completions

    def close(self) -> None:
        """Give up what is still being fetched."""
        self._closed.set()
        self._coming.clear()

    def _run(self, batch: int, prompts: Prompts, outcome: Future[tuple[list[Completion], float]]) -> None:
        started = time.monotonic()
        with self._clock:
            try:
                outcome.set_result((self._until_served(batch, prompts), time.monotonic() - started))
            except BaseException as error:
                outcome.set_exception(error)

    def _until_served(self, batch: int, prompts: Prompts) -> list[Completion]:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._fetch(batch, prompts)
            except LockstepError as error:
                if error.code not in RECOVERABLE or time.monotonic() > deadline or self._closed.is_set():
                    raise
                self._away.set()
            self._closed.wait(_RETRY_S)


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
