"""The learner's lease on a run: its secret and fence, kept in output_dir."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from learner.run_dir.files import LEASE_FILE
from learner.utils.atomic import write_atomically
from learner.utils.wording import option
from shared.errors import InvalidRequest


@dataclass(frozen=True)
class Lease:
    """The right to push to a run: its secret, and a fence, which overrides all lower ones."""

    run_id: str
    secret: str
    fence: int


def load_lease(output_dir: str | Path, run_id: str | None) -> Lease:
    """Return the next lease of the run in `output_dir` (same secret, next fence), or a new one. Writes nothing.

    Raises `invalid_request` if the file is damaged.
    """
    path = Path(output_dir) / LEASE_FILE
    if path.is_file():
        try:
            kept = Lease(**json.loads(path.read_text()))
            for name, kind in (("run_id", str), ("secret", str), ("fence", int)):
                if type(getattr(kept, name)) is not kind:
                    raise TypeError(f"{name} is {getattr(kept, name)!r:.40}")
        except (ValueError, TypeError) as error:
            raise InvalidRequest(
                f"{path} is damaged ({error}); remove it and give {option('takeover', True)}, or a new output_dir"
            ) from error
        if run_id in (None, kept.run_id):
            return Lease(kept.run_id, kept.secret, kept.fence + 1)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(output_dir).resolve().name).strip("-._")[:48] or "run"
    return Lease(run_id or f"{stem}-{secrets.token_hex(3)}", secrets.token_hex(16), 0)


def save_lease(output_dir: str | Path, lease: Lease) -> None:
    """Write the lease atomically, readable by its owner only."""
    write_atomically(Path(output_dir) / LEASE_FILE, json.dumps(asdict(lease)), mode=0o600, durable=True)
