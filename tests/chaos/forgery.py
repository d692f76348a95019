"""Bad pushes, as from a broken network, a broken learner or a replaced one."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import httpx

from shared.adapter_file import MANIFEST_KEY
from shared.wire import LEASE_HEADER
from tests.integration.support.server import HTTP


def reversioned(blob: bytes, fence: int, step: int) -> bytes:
    """Return the blob with another version; its checksum covers the tensors only."""
    length = int.from_bytes(blob[:8], "little")
    document = json.loads(blob[8 : 8 + length])
    manifest = json.loads(document["__metadata__"][MANIFEST_KEY])
    manifest["version"] |= {"fence": fence, "step": step}
    document["__metadata__"][MANIFEST_KEY] = json.dumps(manifest)
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + blob[8 + length :]


def flip_a_bit(blob: bytes, random: Random) -> bytes:
    """Flip one bit of one tensor."""
    start = 8 + int.from_bytes(blob[:8], "little")
    place = random.randrange(start, len(blob))
    return blob[:place] + bytes([blob[place] ^ 1 << random.randrange(8)]) + blob[place + 1 :]


def send(url: str, run_id: str, lease: Path, blob: bytes, *, secret: str | None = None) -> httpx.Response:
    """Push directly to a server, with `secret` instead of the lease's own if given."""
    secret = secret or json.loads(lease.read_text())["secret"]
    path = f"{url}/v1/runs/{run_id}/adapter"
    return HTTP.put(path, content=blob, headers={LEASE_HEADER: secret}, timeout=30.0)


def send_half(url: str, run_id: str, lease: Path, blob: bytes, share: float) -> None:
    """Announce the full body, send a share of it, and close the connection."""
    secret, address = json.loads(lease.read_text())["secret"], urlsplit(url)
    head = (
        f"PUT /v1/runs/{run_id}/adapter HTTP/1.1\r\nhost: {address.netloc}\r\n{LEASE_HEADER}: {secret}\r\n"
        f"content-length: {len(blob)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + blob[: round(len(blob) * share)])
