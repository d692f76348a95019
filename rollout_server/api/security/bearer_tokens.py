"""The server's tokens and their roles, read from files that may change while the server runs."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from rollout_server.api.security.roles import Role
from rollout_server.settings import ServerSettings
from shared.bearer_tokens import TOKEN_VARIABLE, exposure, parse_tokens
from shared.errors import InvalidRequest, LockstepError

logger = logging.getLogger("lockstep.api")


class Tokens:
    """Keeps digests only. A file that changes counts at once; one that becomes unusable changes nothing.

    Raises:
        LockstepError: `invalid_request`: a file that cannot be read or holds no usable token.
    """

    def __init__(self, files: Mapping[Role, Path], fixed: Mapping[Role, str] | None = None) -> None:
        self._files = dict(files)
        self._fixed = [(_digest(token.encode()), role) for role, token in (fixed or {}).items()]
        self._seen = self._stamps()
        self._known = self._read()

    def role_of(self, presented: bytes) -> Role | None:
        """Return the role of a token, None if it is unknown; a near miss takes as long as any other token."""
        stamps = self._stamps()
        if stamps != self._seen:
            self._seen = stamps
            try:
                self._known = self._read()
                logger.info("token files read again: %d tokens", len(self._known))
            except LockstepError as error:
                logger.error("the tokens stay as they were: %s", error)
        digest, found = _digest(presented), None
        for known, role in self._known:
            if hmac.compare_digest(known, digest):
                found = role
        return found

    def _read(self) -> list[tuple[bytes, Role]]:
        known = list(self._fixed)
        for role, path in self._files.items():
            try:
                text = path.read_text()
            except (OSError, ValueError) as error:
                raise InvalidRequest(f"token file {path} cannot be read: {error}") from error
            if (exposed := exposure(path)) is not None:
                logger.warning(exposed)
            known += [(_digest(token.encode()), role) for token in parse_tokens(text, f"token file {path}")]
        digests = [digest for digest, _ in known]
        if len(set(digests)) < len(digests):
            raise InvalidRequest("the same token is given twice; each role needs its own")
        return known

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._files.values()]


def configured_tokens(settings: ServerSettings) -> Tokens | None:
    """Return the tokens of flags and environment; None where requests need no token.

    Raises:
        LockstepError: `invalid_request`: tokens that cannot be used, or none that a learner could push with.
    """
    named = {
        Role.WEIGHTS: settings.token_file,
        Role.GENERATE: settings.generate_token_file,
        Role.METRICS: settings.metrics_token_file,
    }
    files = {role: Path(name) for role, name in named.items() if name}
    variable = os.environ.get(TOKEN_VARIABLE) if Role.WEIGHTS not in files else None
    if variable is not None:
        (token, *others) = parse_tokens(variable, f"${TOKEN_VARIABLE}")
        if others:
            raise InvalidRequest(f"${TOKEN_VARIABLE} holds several lines; use --token-file")
        return Tokens(files, {Role.WEIGHTS: token})
    if files and Role.WEIGHTS not in files:
        raise InvalidRequest(
            f"no learner could push without a token of its own: give --token-file too, or ${TOKEN_VARIABLE}"
        )
    return Tokens(files) if files else None


def learners_token(settings: ServerSettings) -> str | None:
    """Return the newest token of `configured_tokens` that may do everything; None where there is none."""
    if settings.token_file:
        return parse_tokens(Path(settings.token_file).read_text(), f"token file {settings.token_file}")[0]
    return os.environ.get(TOKEN_VARIABLE, "").strip() or None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_ino, status.st_size
    return None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
