"""Credentials of a connection: the learner's bearer token, and TLS trust in the server's certificate."""

from __future__ import annotations

import functools
import logging
import os
import ssl
from pathlib import Path

import httpx

from learner.utils.wording import option
from shared.bearer_tokens import TOKEN_VARIABLE, exposure, parse_tokens
from shared.errors import InvalidRequest, LockstepError

logger = logging.getLogger("lockstep.servers")


def read_token(token_file: str | None) -> str | None:
    """Return the first token of a file, else $LOCKSTEP_TOKEN, else None.

    Raises:
        InvalidRequest: the file cannot be read, or holds no usable token.
    """
    if token_file is None:
        variable = os.environ.get(TOKEN_VARIABLE)
        return parse_tokens(variable, f"${TOKEN_VARIABLE}")[0] if variable else None
    try:
        text = Path(token_file).read_text()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"token_file cannot be read: {error}") from error
    if (exposed := exposure(token_file)) is not None:
        logger.warning(exposed)
    return parse_tokens(text, f"token_file {token_file}")[0]


def ssl_context(ca_file: str | None) -> ssl.SSLContext:
    """Return the context of all connections that trust only the CA in `ca_file`, or, without one, the well-known CAs.

    Raises:
        InvalidRequest: the file holds no certificate.
    """
    try:
        known = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
        return _context(ca_file, Path(ca_file).stat().st_mtime_ns if ca_file else known)
    except OSError as error:  # ssl.SSLError is one
        source = f"ca_file {ca_file}" if ca_file else "$SSL_CERT_FILE or $SSL_CERT_DIR"
        raise InvalidRequest(f"{source} cannot be used: {error}") from error


def tls_error(url: str, error: BaseException) -> LockstepError | None:
    """Return the error of a connection that TLS has refused for good; None if a retry may help."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and cause.reason in _PERMANENT:
            what = cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else cause.reason
            remedy = _PERMANENT[cause.reason] or _UNTRUSTED + option("ca_file")
            return InvalidRequest(f"no connection to {url} ({what}): {remedy}")
        cause = cause.__cause__ or cause.__context__
    return None


@functools.lru_cache(maxsize=8)
def _context(ca_file: str | None, source: object) -> ssl.SSLContext:
    """Make a context once: reading the CAs takes longer than a connection, and there may be many servers."""
    return ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context()


_NO_TLS = "no TLS is spoken there; use http://, or start the server with --ssl-certfile and --ssl-keyfile"
_UNTRUSTED = "the server's certificate is not trusted; give its CA's certificate with "
_PERMANENT = {
    "CERTIFICATE_VERIFY_FAILED": "",
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
}
