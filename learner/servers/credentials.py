"""What proves the learner to the server, and the server to the learner: the bearer token and TLS."""

from __future__ import annotations

import os
import ssl
import warnings
from pathlib import Path
from urllib.parse import urlsplit

from shared.bearer_tokens import TOKEN_VARIABLE, is_loopback, parse_tokens
from shared.errors import InvalidRequest, LockstepError


def read_token(token_file: str | None) -> str | None:
    """The bearer token: the first of a file, else $LOCKSTEP_TOKEN, else none.

    Raises:
        LockstepError: `invalid_request` if the file cannot be read, or holds no usable token.
    """
    if token_file is None:
        variable = os.environ.get(TOKEN_VARIABLE)
        return parse_tokens(variable, f"${TOKEN_VARIABLE}")[0] if variable else None
    try:
        text = Path(token_file).read_text()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"token_file cannot be read: {error}") from error
    return parse_tokens(text, f"token_file {token_file}")[0]


def trust(ca_file: str | None) -> ssl.SSLContext | bool:
    """For httpx's `verify`: the CA in `ca_file` alone; without one the well-known ones, or those of $SSL_CERT_FILE.

    Raises:
        LockstepError: `invalid_request` if the file holds no certificate.
    """
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidRequest(f"ca_file {ca_file} cannot be used: {error}") from error


def warn_if_exposed(url: str, token: str | None) -> None:
    """Warn of a token that everyone on the way to `url` could read."""
    if token and url.startswith("http://") and not is_loopback(urlsplit(url).hostname):
        warnings.warn(f"the token goes to {url} unencrypted; use https://, or a network of your own", stacklevel=3)


def tls_refusal(url: str, error: BaseException) -> LockstepError | None:
    """The error of a connection that failed because of TLS; None where trying again may help."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and cause.reason in _FOR_GOOD:
            what = cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else cause.reason
            message = f"no connection to {url} ({what}): {_FOR_GOOD[cause.reason]}"
            return InvalidRequest(message)
        cause = cause.__cause__ or cause.__context__
    return None


_NO_TLS = "no TLS is spoken there; use http://, or start the server with --ssl-certfile and --ssl-keyfile"
_FOR_GOOD = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not trusted; give its CA's certificate with --ca_file",
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
}
