"""What is left out of vLLM's log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from fastapi import HTTPException

from rollout_server.vllm_compat import versions
from rollout_server.vllm_compat.log_filter import is_no_refusal, leave_refusals_out
from shared.errors import EngineDead, InvalidRequest, LockstepError, Overloaded


def _streamed(logger: logging.Logger, failure: Exception) -> None:
    """Log as vLLM's routes do when a stream ends early."""
    try:
        try:
            raise failure
        except LockstepError as error:
            raise HTTPException(error.status, str(error)) from error
    except Exception:
        logger.exception("Error in completion stream generator.")


def _mistaken(logger: logging.Logger) -> None:
    """Log a mistake in handling a refusal."""
    try:
        try:
            raise InvalidRequest("no")
        except LockstepError:
            {}["a mistake of its own"]
    except Exception:
        logger.exception("Error in completion stream generator.")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(str(record.exc_info[1] if record.exc_info else record.msg))


def test_a_refused_stream_leaves_no_line() -> None:
    logger, kept = logging.getLogger("vllm.entrypoints.lockstep_test"), _Kept()
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    leave_refusals_out()
    try:
        refused = versions.own_refusals()[0]("no such token")
        for failure in (
            refused,
            InvalidRequest("no"),
            Overloaded("too many"),
            EngineDead("gone"),
            ValueError("a mistake"),
        ):
            _streamed(logger, failure)
        _mistaken(logger)
        for code in (404, 500):
            logger.error("Error with model %s", SimpleNamespace(error=SimpleNamespace(code=code)))
        logger.info("all is well")
    finally:
        logger.removeHandler(kept)
        logger.removeFilter(is_no_refusal)
    assert [message.rpartition(": ")[2] for message in kept.messages] == [
        "gone [engine_dead]",
        "a mistake",
        "'a mistake of its own'",
        "Error with model %s",
        "all is well",
    ]
