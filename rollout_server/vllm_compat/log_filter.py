"""vLLM's log, without the requests that have been refused."""

from __future__ import annotations

import logging

from rollout_server.vllm_compat import versions
from shared.errors import LockstepError

_ROUTES = "vllm.entrypoints."


def leave_refusals_out() -> None:
    """Keep refusals out of vLLM's log: its routes log what ends a stream early with a traceback, whoever is to blame.

    For loggers that exist, so vLLM's routes must have been imported.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(_ROUTES):
            logging.getLogger(name).addFilter(is_no_refusal)


def is_no_refusal(record: logging.LogRecord) -> bool:
    """Return whether a record is of something else than a request that this server, or vLLM, has refused."""
    # A model that there is not: vLLM logs its answer.
    answered = [getattr(getattr(each, "error", None), "code", 500) for each in record.args or ()]
    if any(isinstance(code, int) and code < 500 for code in answered):
        return False
    own = versions.own_refusals()
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if isinstance(error, LockstepError):
            return error.status >= 500
        if isinstance(error, own):
            return False
        error = error.__cause__  # not its context: a mistake in handling a refusal is none
    return True
