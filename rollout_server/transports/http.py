"""HTTP transport: the request body goes, as it arrives, into shared memory that the workers map."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from shared.adapter_file import AdapterHeader, header_length, parse_header
from shared.errors import ErrorCode, LockstepError

#: Without it (no Linux) the default folder for temporary files has to do.
_SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class StagedAdapter:
    """A complete blob in shared memory. Its checksum is the workers' business: it is taken of what lies in the slot."""

    path: Path
    header: AdapterHeader
    seconds: float

    def discard(self) -> None:
        """Free the shared memory. Workers that still map it keep their pages."""
        self.path.unlink(missing_ok=True)


async def receive_adapter(
    body: AsyncIterator[bytes], max_bytes: int, check: Callable[[AdapterHeader], Awaitable[None]]
) -> StagedAdapter:
    """Receive one blob. `check` sees its header before any tensor byte is stored and raises to refuse it.

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
    header = parse_header(bytes(head[8:data_offset]))
    if header.total_bytes > max_bytes:
        raise LockstepError(
            ErrorCode.TOO_LARGE,
            f"the adapter has {header.total_bytes} bytes, this server takes {max_bytes}; see --max-adapter-mib",
        )
    await check(header)

    descriptor, name = tempfile.mkstemp(prefix="lockstep-", suffix=".safetensors", dir=_SHARED_MEMORY)
    staged = StagedAdapter(Path(name), header, seconds=0.0)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            await _store(body, head, header, file)
    except BaseException:
        staged.discard()
        raise
    return replace(staged, seconds=time.monotonic() - started)


async def _store(body: AsyncIterator[bytes], head: bytearray, header: AdapterHeader, file: BinaryIO) -> None:
    total = header.total_bytes
    received = len(head)
    try:
        file.write(head[: min(received, total)])
        async for chunk in body:
            received += len(chunk)
            if received > total:
                break
            file.write(chunk)
    except OSError as error:
        raise LockstepError(
            ErrorCode.INSTALL_FAILED, f"no room for the adapter in shared memory: {error}; give the server more"
        ) from error
    if received > total:
        raise LockstepError(
            ErrorCode.MALFORMED_ADAPTER, f"the body goes on after the {total} bytes its header announces"
        )
    if received < total:
        raise _truncated(received, f"{total} bytes")


def _truncated(received: int, wanted: str) -> LockstepError:
    return LockstepError(
        ErrorCode.MALFORMED_ADAPTER, f"the body ends after {received} bytes, before {wanted}; push again"
    )
