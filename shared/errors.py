"""One error body and one list of codes for every route."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel


class ErrorCode(StrEnum):
    """What went wrong, for programs. The message says it for people."""

    INVALID_REQUEST = "invalid_request"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    NOT_READY = "not_ready"
    ENGINE_DEAD = "engine_dead"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    # tokens
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    # runs and versions
    UNKNOWN_RUN = "unknown_run"
    NO_FREE_RUN = "no_free_run"
    LEASE_MISMATCH = "lease_mismatch"
    STALE_VERSION = "stale_version"
    VERSION_NOT_ACTIVE = "version_not_active"
    BASE_NOT_SERVED = "base_not_served"
    STEP_NOT_REACHED = "step_not_reached"
    NO_FREE_SLOT = "no_free_slot"
    NO_GROUP = "no_group"
    UNKNOWN_LAYOUT = "unknown_layout"
    # adapters
    MALFORMED_ADAPTER = "malformed_adapter"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    BASE_MISMATCH = "base_mismatch"
    UNSUPPORTED_ADAPTER = "unsupported_adapter"
    RANK_TOO_HIGH = "rank_too_high"
    SHAPE_MISMATCH = "shape_mismatch"
    NOT_FINITE = "not_finite"
    INSTALL_FAILED = "install_failed"


_STATUS: dict[ErrorCode, int] = {
    ErrorCode.NOT_READY: 503,
    ErrorCode.ENGINE_DEAD: 503,
    ErrorCode.NO_FREE_SLOT: 503,
    ErrorCode.TIMEOUT: 408,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.DRAINING: 503,
    ErrorCode.IDEMPOTENCY_CONFLICT: 409,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.UNKNOWN_RUN: 404,
    ErrorCode.LEASE_MISMATCH: 403,
    ErrorCode.NO_FREE_RUN: 409,
    ErrorCode.STALE_VERSION: 409,
    ErrorCode.NO_GROUP: 409,
    ErrorCode.UNKNOWN_LAYOUT: 409,
    ErrorCode.VERSION_NOT_ACTIVE: 409,
    ErrorCode.STEP_NOT_REACHED: 409,
    ErrorCode.BASE_NOT_SERVED: 409,
    ErrorCode.BASE_MISMATCH: 409,
    ErrorCode.INSTALL_FAILED: 500,
}


class ErrorDetail(BaseModel):
    """`message` says what to do; `detail` carries figures a program may want."""

    code: ErrorCode
    message: str
    detail: dict[str, Any] = {}


class ErrorBody(BaseModel):
    """The JSON body of every answer that is not a success."""

    error: ErrorDetail


_LONGEST = 4000


def sendable(text: str) -> str:
    """`text`, which may quote what a client sent, short and encodable: JSON can hold halves of characters."""
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


class LockstepError(Exception):
    """An error that both sides of the wire understand."""

    def __init__(self, code: ErrorCode, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = sendable(message)
        self.detail = detail

    @property
    def status(self) -> int:
        """HTTP status code for this error."""
        return _STATUS.get(self.code, 422 if self.code is not ErrorCode.INVALID_REQUEST else 400)

    def body(self) -> ErrorBody:
        """The JSON body for this error."""
        return ErrorBody(error=ErrorDetail(code=self.code, message=self.message, detail=self.detail))

    def __str__(self) -> str:
        return f"{self.message} [{self.code.value}]"
