"""Bad pushes, as from a broken network, a broken learner or a replaced one."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httpx

from shared.adapter_file import LORA_A, LORA_B, MANIFEST_KEY
from shared.wire import LEASE_HEADER
from tests.integration.support.server import HTTP


def reversioned(blob: bytes, fence: int, step: int) -> bytes:
    """Return the blob with another version; its checksum covers the tensors only."""
    return _with_manifest(blob, lambda manifest: manifest["version"].update(fence=fence, step=step))


def other_run(blob: bytes, run_id: str) -> bytes:
    """Return the blob as one of another run."""
    return _with_manifest(blob, lambda manifest: manifest["version"].update(run_id=run_id))


def renamed(blob: bytes, length: int) -> bytes:
    """Return the blob with a name of that length for one of its modules."""
    document, manifest, data = _parts(blob)
    old, new = sorted(manifest["modules"])[0], "m" * length
    manifest["modules"][new] = manifest["modules"].pop(old)
    for suffix in (LORA_A, LORA_B):
        document[new + suffix] = document.pop(old + suffix)
    return _joined(document, manifest, data)


def flip_a_bit(blob: bytes, random: Random) -> bytes:
    """Flip one bit of one tensor."""
    start = 8 + int.from_bytes(blob[:8], "little")
    place = random.randrange(start, len(blob))
    return blob[:place] + bytes([blob[place] ^ 1 << random.randrange(8)]) + blob[place + 1 :]


def send(
    url: str, run_id: str, lease: Path, blob: bytes, *, secret: str | None = None, **headers: str
) -> httpx.Response:
    """Push directly to a server, with `secret` instead of the lease's own if given."""
    secret = secret or json.loads(lease.read_text())["secret"]
    path = f"{url}/v1/runs/{run_id}/adapter"
    return HTTP.put(path, content=blob, headers={LEASE_HEADER: secret, **headers}, timeout=30.0)


def send_half(url: str, run_id: str, lease: Path, blob: bytes, share: float) -> None:
    """Announce the full body, send a share of it, and close the connection."""
    secret, address = json.loads(lease.read_text())["secret"], urlsplit(url)
    head = (
        f"PUT /v1/runs/{run_id}/adapter HTTP/1.1\r\nhost: {address.netloc}\r\n{LEASE_HEADER}: {secret}\r\n"
        f"content-length: {len(blob)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + blob[: round(len(blob) * share)])


def _with_manifest(blob: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    document, manifest, data = _parts(blob)
    change(manifest)
    return _joined(document, manifest, data)


def _parts(blob: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return header document, manifest, and tensor bytes."""
    length = int.from_bytes(blob[:8], "little")
    document = json.loads(blob[8 : 8 + length])
    return document, json.loads(document["__metadata__"][MANIFEST_KEY]), blob[8 + length :]


def _joined(document: dict[str, Any], manifest: dict[str, Any], data: bytes) -> bytes:
    document["__metadata__"][MANIFEST_KEY] = json.dumps(manifest)
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + data
