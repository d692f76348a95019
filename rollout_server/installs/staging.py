"""HTTP transport: write the request body, as it arrives, into shared memory that the workers map."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from rollout_server.ipc.memory import SharedMemory
from shared.adapter_file import AdapterHeader, header_length, parse_header
from shared.bounded_json import SMALL
from shared.errors import InstallFailed, LockstepError, MalformedAdapter, TooLarge


@dataclass
class Staging:
    """Reused shared memory of this server: fresh pages cost as much as the copy into them."""

    max_bytes: int
    _free: list[SharedMemory] = field(default_factory=list)

    async def receive(
        self, body: AsyncIterator[bytes], check: Callable[[AdapterHeader], Awaitable[None]]
    ) -> tuple[SharedMemory, AdapterHeader, float]:
        """Receive one blob and return it with the seconds it took; the workers verify its checksum.

        Args:
            check: gets the header before any tensor byte is stored, and raises to refuse it.

        Raises:
            LockstepError: `malformed_adapter`, `too_large`, and what `check` raises.
        """
        started = time.monotonic()
        head = bytearray()
        async for chunk in body:
            head += chunk
            if len(head) >= 8 and len(head) >= (data_offset := 8 + header_length(bytes(head[:8]))):
                break
        else:
            raise _truncated(len(head), "its header")
        text = bytes(head[8:data_offset])
        # A large one takes longer than the event loop may be kept from other requests.
        header = await asyncio.to_thread(_parse, text) if len(text) > SMALL else _parse(text)
        if header.total_bytes > self.max_bytes:
            raise TooLarge(
                f"the adapter has {header.total_bytes} bytes, this server takes {self.max_bytes}; see --max-adapter-mib"
            )
        await check(header)
        memory = self._free.pop() if self._free else SharedMemory.make()
        try:
            await _store(body, head, header, memory.descriptor)
        except BaseException:
            memory.free()
            raise
        return memory, header, time.monotonic() - started

    def give_back(self, memory: SharedMemory) -> None:
        """Take memory back for the next adapter, after all workers have read it."""
        self._free.append(memory)

    def close(self) -> None:
        """Free the shared memory."""
        while self._free:
            self._free.pop().free()


def _parse(header: bytes) -> AdapterHeader:
    parsed = parse_header(header)
    _ = parsed.layout.key  # computed once, here
    return parsed


async def _store(body: AsyncIterator[bytes], head: bytearray, header: AdapterHeader, descriptor: int) -> None:
    total, received = header.total_bytes, len(head)
    try:
        os.pwrite(descriptor, head[: min(received, total)], 0)
        async for chunk in body:
            if received + len(chunk) <= total:
                os.pwrite(descriptor, chunk, received)
            received += len(chunk)
            if received > total:
                break
    except OSError as error:
        raise InstallFailed(f"no memory for the adapter: {error}; free some on the server's host") from error
    if received > total:
        raise MalformedAdapter(f"the body goes on after the {total} bytes its header announces")
    if received < total:
        raise _truncated(received, f"{total} bytes")


def _truncated(received: int, wanted: str) -> LockstepError:
    return MalformedAdapter(f"the body ends after {received} bytes, before {wanted}; push again")
