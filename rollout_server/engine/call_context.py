"""The HTTP call that an engine request belongs to."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from shared.errors import LockstepError
from shared.weights import WeightVersion


@dataclass
class CallContext:
    """One HTTP request to vLLM's routes, which may become several requests to the engine.

    Attributes:
        wanted: the precondition.
        versions: those it was admitted to, in order.
        refusal: what the door said instead.
    """

    wanted: WeightVersion | None = None
    versions: dict[str, None] = field(default_factory=dict)
    refusal: LockstepError | None = None

    def admitted(self, version: WeightVersion | None) -> None:
        """The door has admitted a part of it."""
        self.versions[str(version or "base")] = None


#: That of the running task; None beneath our own routes.
CALL_CONTEXT: ContextVar[CallContext | None] = ContextVar("lockstep_call", default=None)
