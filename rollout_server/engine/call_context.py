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
        wanted: the version that it insists on.
        versions: those it was admitted to, in order; `base` for the base model.
        refusal: why `EngineProxy` did not admit it.
    """

    wanted: WeightVersion | None = None
    versions: dict[str, None] = field(default_factory=dict)
    refusal: LockstepError | None = None


#: Of the running task; None in our own routes.
CALL_CONTEXT: ContextVar[CallContext | None] = ContextVar("lockstep_call", default=None)
