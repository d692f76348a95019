"""The process on the training GPU: GRPO on a LoRA adapter, rollouts from a rollout server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learner.trainer.attach import attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    """Import torch and TRL only when `attach` is used: `learner eval` needs neither."""
    if name == "attach":
        from learner.trainer.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
