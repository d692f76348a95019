"""The learner's claim on a run: its secret and fence, kept in output_dir."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import InvalidRequest

LEASE_FILE = "lease.json"


@dataclass(frozen=True)
class Lease:
    """The right to push to a run: its secret, and a fence that outranks all lower ones."""

    run_id: str
    secret: str
    fence: int


def load_lease(output_dir: str | Path, run_id: str | None) -> Lease:
    """The lease kept in `output_dir`, or a new one; nothing is written yet.

    A directory that holds a lease is the same run started again: same secret, next fence.
    """
    path = Path(output_dir) / LEASE_FILE
    if path.is_file():
        try:
            kept = Lease(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InvalidRequest(
                f"{path} is damaged ({error}); remove it and use --takeover, or a new output_dir"
            ) from error
        if run_id in (None, kept.run_id):
            return Lease(kept.run_id, kept.secret, kept.fence + 1)
    return Lease(run_id or default_run_id(output_dir), secrets.token_hex(16), 0)


def save_lease(output_dir: str | Path, lease: Lease) -> None:
    """Keep the lease, readable by its owner only; the file is never seen half-written."""
    path = Path(output_dir) / LEASE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        json.dump(asdict(lease), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def default_run_id(output_dir: str | Path) -> str:
    """A run id from the directory's name and a random suffix."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(output_dir).resolve().name).strip("-._")[:48] or "run"
    return f"{stem}-{secrets.token_hex(3)}"
