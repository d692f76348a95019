"""Generate requests under way, and the answers kept for clients that ask a second time."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from rollout_server.settings import ServerSettings
from shared.errors import EngineDead, IdempotencyConflict, LockstepError, Timeout
from shared.rollouts import HEARTBEAT_SECONDS, GenerateRequest, RolloutGroup

logger = logging.getLogger("rollout_server")

#: Set the request running: one task for each prompt.
Start = Callable[[], Awaitable[list[asyncio.Future[RolloutGroup]]]]


class Answer:
    """One generate request: its groups as they finish, for as many clients as join it.

    It ends when all groups are there, with an error, or some seconds after its last client has left.
    """

    def __init__(self, start: Start, orphan_seconds: float = 0.0) -> None:
        self._orphan_seconds = orphan_seconds
        self._groups: list[tuple[int, bytes]] = []  # prompt index, JSON; in the order they finished
        self._error: LockstepError | None = None
        self._news = asyncio.Event()
        self._clients = 0
        self._orphaned: asyncio.TimerHandle | None = None
        self._started = self._ended = False
        self.task = asyncio.ensure_future(self._run(start))
        self.task.add_done_callback(self._end)

    @property
    def size(self) -> int:
        """Bytes of what is there so far."""
        return sum(len(group) for _, group in self._groups)

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def join(self) -> None:
        """A client waits for it; to be followed by `leave`."""
        self._clients += 1
        if self._orphaned is not None:
            self._orphaned.cancel()
            self._orphaned = None

    def leave(self) -> None:
        """A client has got it, or has gone away."""
        self._clients -= 1
        if self._clients or self._ended:
            return
        if self._orphan_seconds:
            loop = asyncio.get_running_loop()
            self._orphaned = loop.call_later(self._orphan_seconds, self.task.cancel)
        else:
            self.task.cancel()

    async def started(self) -> None:
        """Wait until it runs.

        Raises:
            LockstepError: it was refused.
        """
        while not self._started and not self._ended:
            await self._news.wait()
        if not self._started:
            self._raise()

    async def groups(self) -> list[bytes]:
        """All groups as JSON, in the order of the prompts.

        Raises:
            LockstepError: what it ended with.
        """
        async for _ in self.lines():
            pass
        return [group for _, group in sorted(self._groups)]

    async def lines(self) -> AsyncIterator[bytes]:
        """Groups as JSON in the order they finish; those that have finished come at once. Empty where nothing has
        finished for `HEARTBEAT_SECONDS`.

        Raises:
            LockstepError: what it ended with.
        """
        sent = 0
        while True:
            news, ended = self._news, self._ended
            while sent < len(self._groups):
                yield self._groups[sent][1]
                sent += 1
            if ended:
                break
            try:
                await asyncio.wait_for(news.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                yield b""
        self._raise()

    async def _run(self, start: Start) -> None:
        tasks: list[asyncio.Future[RolloutGroup]] = []
        try:
            tasks = await start()
            self._started = True
            self._tell()
            for finished in asyncio.as_completed(tasks):
                group = await finished
                self._groups.append((group.prompt_index, group.model_dump_json().encode()))
                self._tell()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, task: asyncio.Future[None]) -> None:
        if self._orphaned is not None:
            self._orphaned.cancel()
        if task.cancelled():
            self._error = Timeout("ended because no client waited for it any more")
        elif isinstance(error := task.exception(), LockstepError):
            self._error = error
        elif error is not None:
            logger.error("a generate request failed", exc_info=error)
            self._error = EngineDead(f"generation failed: {type(error).__name__}: {error}")
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _raise(self) -> None:
        if self._error is not None:
            # One object for several clients would collect the tracebacks of all of them.
            raise LockstepError.from_detail(self._error.body().error)


@dataclass(eq=False)
class _Keyed:
    digest: bytes
    answer: Answer
    forget: asyncio.TimerHandle | None = None


@dataclass
class Answers:
    """All of this server's. One with a key is found again by the same caller until its time to live has passed; one
    that failed is not, so that a second try runs anew.
    """

    settings: ServerSettings
    _running: set[Answer] = field(default_factory=set)
    _keyed: dict[tuple[str, str], _Keyed] = field(default_factory=dict)
    _kept: dict[tuple[str, str], int] = field(default_factory=dict)  # finished ones, oldest first, and their bytes

    def open(self, start: Start, body: GenerateRequest, caller: str = "", key: str | None = None) -> Answer:
        """The answer to `body`: a new one, or the one that the caller's key stands for.

        Raises:
            LockstepError: `idempotency_conflict` if the key stands for another body.
        """
        if key is None:
            return self._begin(start)
        place, digest = (caller, key), _digest(body)
        known = self._keyed.get(place)
        if known is None:
            answer = self._begin(start, self.settings.orphan_seconds)
            self._keyed[place] = _Keyed(digest, answer)
            answer.task.add_done_callback(lambda _: self._finished(place))
            return answer
        if known.digest != digest:
            raise IdempotencyConflict(
                "this Idempotency-Key was used for another request; take a new key for every request"
            )
        return known.answer

    def _begin(self, start: Start, orphan_seconds: float = 0.0) -> Answer:
        answer = Answer(start, orphan_seconds)
        self._running.add(answer)  # the loop keeps only weak references to tasks
        answer.task.add_done_callback(lambda _: self._running.discard(answer))
        return answer

    def _finished(self, place: tuple[str, str]) -> None:
        keyed = self._keyed[place]
        if keyed.answer.failed:
            del self._keyed[place]
            return
        loop = asyncio.get_running_loop()
        keyed.forget = loop.call_later(self.settings.idempotency_ttl, self._forget, place)
        self._kept[place] = keyed.answer.size
        while sum(self._kept.values()) > self.settings.idempotency_mib * 2**20:
            self._forget(next(iter(self._kept)))

    def _forget(self, place: tuple[str, str]) -> None:
        forget = self._keyed.pop(place).forget
        if forget is not None:
            forget.cancel()
        del self._kept[place]


def _digest(body: GenerateRequest) -> bytes:
    """Of all that decides on the groups; whether they are streamed does not."""
    return hashlib.sha256(body.model_dump_json(exclude={"stream"}).encode()).digest()
