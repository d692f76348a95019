"""Bearer tokens in files, and hosts that need no encryption."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from pathlib import Path

from shared.errors import InvalidRequest

#: The environment variable that both sides read when no file is named.
TOKEN_VARIABLE = "LOCKSTEP_TOKEN"
_MIN_LENGTH = 16
_ADVICE = "make one with `openssl rand -hex 32`"
#: Mounted into one container only, and readable for every user in it.
_CONTAINER_SECRETS = ("/run/secrets/", "/var/run/secrets/")


def parse_tokens(text: str, source: str) -> list[str]:
    """Return the tokens of a file: one a line, the newest first. Servers accept all of them, clients send the first.

    Raises `invalid_request`, with `source`, if there is none, or one that is too short or cannot stand in a header.
    """
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if not tokens:
        raise InvalidRequest(f"{source} holds no token; {_ADVICE}")
    for number, token in enumerate(tokens, 1):
        if not re.fullmatch(rf"[!-~]{{{_MIN_LENGTH},}}", token):
            raise InvalidRequest(
                f"{source}: token {number} of {len(tokens)} must be {_MIN_LENGTH} characters or more, visible ASCII "
                f"without spaces; {_ADVICE}"
            )
    return tokens


def exposure(path: str | Path) -> str | None:
    """Return who else may use the token in a file, and what to do about it; None if nobody, or if that is not known.

    The group of a file that belongs to another user is how this process may read it, so it may; others never.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode) or os.path.abspath(path).startswith(_CONTAINER_SECRETS):
        return None
    mode = stat.S_IMODE(status.st_mode)
    if not mode & (0o066 if status.st_uid == os.geteuid() else 0o026):
        return None
    who = "every user of this machine" if mode & 0o006 else "its group"
    what = "changed" if mode & 0o022 else "read"
    return f"token file {path} can be {what} by {who} (mode {mode:04o}): `chmod go= {path}`, and replace the token"


def is_loopback(host: str | None) -> bool:
    """Return whether `host` is this machine alone. None and wildcards are every interface, so they are not."""
    try:
        return host is not None and (host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False
