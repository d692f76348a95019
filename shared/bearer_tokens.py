"""Bearer tokens in files, and hosts that need no encryption."""

from __future__ import annotations

import ipaddress
import re

from shared.errors import InvalidRequest

#: The environment variable that both sides read when no file is named.
TOKEN_VARIABLE = "LOCKSTEP_TOKEN"
_MIN_LENGTH = 16
_ADVICE = "make one with `openssl rand -hex 32`"


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


def is_loopback(host: str | None) -> bool:
    """Return whether `host` is this machine alone. None and wildcards are every interface, so they are not."""
    try:
        return host is not None and (host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False
