"""One error body and one list of codes for every route."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel


class ErrorCode(StrEnum):
    """Kind of an error, for programs; the message is for people."""

    INVALID_REQUEST = "invalid_request"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    NOT_READY = "not_ready"
    ENGINE_DEAD = "engine_dead"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    UNKNOWN_ROUTE = "unknown_route"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    INTERNAL_ERROR = "internal_error"
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
    UNKNOWN_SESSION = "unknown_session"
    SESSION_ENDED = "session_ended"
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


class ErrorDetail(BaseModel):
    """`message` says what to do; `detail` holds numbers that a program may want."""

    code: ErrorCode
    message: str
    detail: dict[str, Any] = {}


class ErrorBody(BaseModel):
    """The JSON body of every response that is not a success."""

    error: ErrorDetail


def sendable(text: str) -> str:
    """Return `text`, which may quote a client, short and encodable: JSON can hold halves of characters."""
    text = f"{text[:4000]}..." if len(text) > 4000 else text
    return text.encode("utf-8", "backslashreplace").decode()


class LockstepError(Exception):
    """Base of every error that both sides of the wire understand; raise a subclass.

    Attributes:
        code: for programs; the wire carries it.
        status: HTTP status.
        message: for people; says what to do.
        detail: numbers that a program may want.

    Example:
        try:
            client.state()
        except Unauthenticated:
            ...  # the token is wrong
        except LockstepError as error:
            print(error.code, error.message)
    """

    code: ClassVar[ErrorCode]
    status: ClassVar[int]

    def __init_subclass__(cls, *, code: ErrorCode | None = None, status: int = 422) -> None:
        if code is not None:
            cls.code, cls.status = code, status

    def __init__(self, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.message = sendable(message)
        self.detail = detail

    @staticmethod
    def from_detail(detail: ErrorDetail) -> LockstepError:
        """Return the error that a body of the wire describes."""
        return error_class(detail.code)(detail.message, **detail.detail)

    def body(self) -> ErrorBody:
        """Return the JSON body of this error."""
        return ErrorBody(error=ErrorDetail(code=self.code, message=self.message, detail=self.detail))

    def __str__(self) -> str:
        return f"{self.message} [{self.code.value}]"


class InvalidRequest(LockstepError, code=ErrorCode.INVALID_REQUEST, status=400): ...


class ProtocolMismatch(LockstepError, code=ErrorCode.PROTOCOL_MISMATCH): ...


class NotReady(LockstepError, code=ErrorCode.NOT_READY, status=503): ...


class EngineDead(LockstepError, code=ErrorCode.ENGINE_DEAD, status=503): ...


class Timeout(LockstepError, code=ErrorCode.TIMEOUT, status=408): ...


class TooLarge(LockstepError, code=ErrorCode.TOO_LARGE, status=413): ...


class Overloaded(LockstepError, code=ErrorCode.OVERLOADED, status=429): ...


class Draining(LockstepError, code=ErrorCode.DRAINING, status=503): ...


class UnknownRoute(LockstepError, code=ErrorCode.UNKNOWN_ROUTE, status=404): ...


class MethodNotAllowed(LockstepError, code=ErrorCode.METHOD_NOT_ALLOWED, status=405): ...


class InternalError(LockstepError, code=ErrorCode.INTERNAL_ERROR, status=500): ...


class Unauthenticated(LockstepError, code=ErrorCode.UNAUTHENTICATED, status=401): ...


class Forbidden(LockstepError, code=ErrorCode.FORBIDDEN, status=403): ...


class UnknownRun(LockstepError, code=ErrorCode.UNKNOWN_RUN, status=404): ...


class NoFreeRun(LockstepError, code=ErrorCode.NO_FREE_RUN, status=409): ...


class LeaseMismatch(LockstepError, code=ErrorCode.LEASE_MISMATCH, status=403): ...


class StaleVersion(LockstepError, code=ErrorCode.STALE_VERSION, status=409): ...


class VersionNotActive(LockstepError, code=ErrorCode.VERSION_NOT_ACTIVE, status=409): ...


class BaseNotServed(LockstepError, code=ErrorCode.BASE_NOT_SERVED, status=409): ...


class StepNotReached(LockstepError, code=ErrorCode.STEP_NOT_REACHED, status=409): ...


class UnknownSession(LockstepError, code=ErrorCode.UNKNOWN_SESSION, status=404): ...


# 410, because clients of OpenAI and Anthropic try 409 and 429 again.
class SessionEnded(LockstepError, code=ErrorCode.SESSION_ENDED, status=410): ...


class NoFreeSlot(LockstepError, code=ErrorCode.NO_FREE_SLOT, status=503): ...


class NoGroup(LockstepError, code=ErrorCode.NO_GROUP, status=409): ...


class UnknownLayout(LockstepError, code=ErrorCode.UNKNOWN_LAYOUT, status=409): ...


class MalformedAdapter(LockstepError, code=ErrorCode.MALFORMED_ADAPTER): ...


class ChecksumMismatch(LockstepError, code=ErrorCode.CHECKSUM_MISMATCH): ...


class BaseMismatch(LockstepError, code=ErrorCode.BASE_MISMATCH, status=409): ...


class UnsupportedAdapter(LockstepError, code=ErrorCode.UNSUPPORTED_ADAPTER): ...


class RankTooHigh(LockstepError, code=ErrorCode.RANK_TOO_HIGH): ...


class ShapeMismatch(LockstepError, code=ErrorCode.SHAPE_MISMATCH): ...


class NotFinite(LockstepError, code=ErrorCode.NOT_FINITE): ...


class InstallFailed(LockstepError, code=ErrorCode.INSTALL_FAILED, status=500): ...


def error_class(code: ErrorCode) -> type[LockstepError]:
    """Return the class that carries `code`."""
    return next(kind for kind in LockstepError.__subclasses__() if kind.code is code)
