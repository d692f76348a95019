"""Errors of the Hugging Face hub: those of options, and those that another try may not meet."""

from __future__ import annotations

from http import HTTPStatus

import httpx
from huggingface_hub import constants

from shared.errors import InvalidRequest, LockstepError


def hub_error(message: str, error: Exception, refused: type[LockstepError] = InvalidRequest) -> Exception:
    """Return `refused`, or a `ConnectionError` where the hub could not be reached, or had no time, as `error` says.

    Example:
        try:
            config = AutoConfig.from_pretrained(name)
        except OSError as error:
            raise hub_error(f"{name} cannot be loaded: {error}", error) from error
    """
    return ConnectionError(f"{message}; another try may succeed") if _may_pass(error) else refused(message)


def _may_pass(error: BaseException | None) -> bool:
    """Return whether an error, or one that it comes from, is of the connection or of the hub's server."""
    while error is not None and not constants.HF_HUB_OFFLINE:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if isinstance(error, ConnectionError | TimeoutError | httpx.TransportError):
            return True
        error = error.__cause__ or error.__context__
    return False
