"""Bounds on the work of this server, and whether it takes new work at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar

from rollout_server.settings import ServerSettings
from shared.errors import Draining, LockstepError, Overloaded, TooLarge

#: Memory of the running request's body, as `Capacity.hold` has counted it.
BODY_BYTES: ContextVar[int] = ContextVar("lockstep_body_bytes", default=0)


class Capacity:
    """Counts work under way, over all routes, and refuses work beyond the settings.

    Sequences (prompts times n) are bounded because they fill the engine, requests for the memory of their bodies.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.sequences = 0
        self.requests = 0
        self.waiting = 0  # requests that wait for a step, which are no others' hindrance
        self._body_bytes = self._waiting_bytes = 0
        self._draining = asyncio.Event()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken on."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Take nothing new from now on; work under way goes on."""
        self._draining.set()

    async def drained(self, seconds: float) -> bool:
        """Wait for `drain`, then until nothing is under way or `seconds` have passed; return whether all is done."""
        await self._draining.wait()
        deadline = asyncio.get_running_loop().time() + seconds
        while self.sequences or self.requests or self.waiting:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def check(self, sequences: int = 1) -> None:
        """Check that there is room for so many.

        Raises:
            LockstepError: `draining`, `overloaded`.
        """
        if self.draining:
            raise Draining("this server is about to leave and takes nothing new; ask another, or its successor")
        if self.sequences + sequences > self._settings.max_sequences:
            raise Overloaded(
                f"{self.sequences} sequences are under way, {sequences} more would go beyond --max-sequences "
                f"{self._settings.max_sequences}; ask again after the seconds of Retry-After",
                sequences=self.sequences,
            )

    def check_size(self, prompts: int, n: int = 1) -> None:
        """Raise `too_large` if so many could never be taken."""
        limits, sequences = self._settings, prompts * n
        for flag, asked, limit in (
            ("--max-prompts", prompts, limits.max_prompts),
            ("--max-n", n, limits.max_n),
            ("--max-sequences", sequences, limits.max_sequences),
        ):
            if asked > limit:
                raise too_large(f"{prompts} prompts with n = {n}", flag, limit)

    def check_sequences(self, sequences: int) -> None:
        """Raise `too_large` if one request has more than could ever be under way."""
        if sequences > (limit := self._settings.max_sequences):
            raise too_large(f"{sequences} sequences or more (prompts times n)", "--max-sequences", limit)

    def take(self, prompts: int, n: int = 1) -> Callable[[], None]:
        """Count `prompts` times `n` sequences as under way; return a function that gives the room back, once.

        Raises:
            LockstepError: `too_large` if they could never be taken; `draining`, `overloaded`.
        """
        self.check_size(prompts, n)
        sequences = prompts * n
        self.check(sequences)
        self.sequences += sequences
        taken = [sequences]

        def give_back() -> None:
            if taken:
                self.sequences -= taken.pop()

        return give_back

    def check_tokens(self, tokens: int) -> None:
        """Check the `tokens` of one request, given and asked for; raises `too_large`."""
        limit = self._settings.max_request_tokens
        if tokens > limit:
            raise too_large(f"{tokens} tokens, given and asked for", "--max-request-tokens", limit)

    @contextlib.contextmanager
    def request(self, *, bounded: bool = True) -> Iterator[None]:
        """Count a request as under way; raises `overloaded`."""
        if bounded and self.requests >= self._settings.max_requests:
            raise Overloaded(
                f"{self.requests} requests are under way, as many as --max-requests allows; ask again after the "
                "seconds of Retry-After"
            )
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def wait(self, event: Awaitable[None]) -> None:
        """Wait for `event`, which others may have to bring about: meanwhile the request counts apart.

        Raises:
            LockstepError: `overloaded` where too many wait, or hold too much memory, or where there is no room for the
                request when it goes on; `draining`.
        """
        limits, size = self._settings, BODY_BYTES.get()
        waiting = asyncio.ensure_future(event)
        leaving = asyncio.ensure_future(self._draining.wait())
        self._count_waiting(1, size)
        try:
            if self.waiting > limits.max_requests or self._waiting_bytes > limits.max_bodies_mib * 2**20 / 4:
                raise Overloaded(
                    f"{self.waiting - 1} requests wait for a step already, as many as --max-requests, or a quarter of "
                    "--max-bodies-mib, allow; ask again after the seconds of Retry-After"
                )
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
            else:
                self.check(0)
        finally:
            waiting.cancel()
            leaving.cancel()
            self._count_waiting(-1, -size)
        if self.requests > limits.max_requests or self._body_bytes > limits.max_bodies_mib * 2**20:
            raise Overloaded(
                "the step has been reached, and --max-requests or --max-bodies-mib leave no room for the request; ask "
                "again after the seconds of Retry-After"
            )

    def _count_waiting(self, requests: int, size: int) -> None:
        self.waiting += requests
        self.requests -= requests
        self._waiting_bytes += size
        self._body_bytes -= size

    def hold(self, size: int) -> None:
        """Count `size` more bytes of bodies in memory, less if negative.

        Raises:
            LockstepError: `overloaded`; `too_large` where there could never be room.
        """
        if size > (limit := self._settings.max_bodies_mib * 2**20):
            raise too_large(f"{size} bytes, as they are in memory,", "--max-bodies-mib", self._settings.max_bodies_mib)
        if size > 0 and self._body_bytes + size > limit:
            raise Overloaded(
                f"requests of --max-bodies-mib {self._settings.max_bodies_mib} are being read or worked on; ask again "
                "after the seconds of Retry-After"
            )
        self._body_bytes += size


def too_large(what: str, flag: str, limit: int) -> LockstepError:
    """Return the error for a request beyond a limit."""
    return TooLarge(f"{what} are beyond the server's {flag} {limit}; split the request", limit=limit)
