"""The process on the training GPU: GRPO on a LoRA adapter, rollouts from a rollout server."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Ours lies beside this package, whatever is called `shared` in the working directory or beside a script.
sys.path.insert(0, _beside := str(Path(__file__).parents[1]))
import shared

sys.path.remove(_beside)
if not hasattr(shared, "PROTOCOL_VERSION"):
    raise ImportError(f"{shared} was imported before Lockstep's module of that name: rename yours")

# TRL says it five times, of a vLLM that is beside it and that it does not use here.
warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")

if TYPE_CHECKING:
    from learner.trainer.attach import attach

__all__ = ["attach", "do_without_videos"]


def do_without_videos() -> None:
    """Let processors of models of images load where torchvision or num2words are missing, which videos alone need.

    For a script that loads one itself, or lets `GRPOTrainer` do so: call it first.
    """
    import transformers

    from shared import image_processors

    image_processors.do_without_videos(transformers)


def __getattr__(name: str) -> Any:
    """Import torch and TRL only when `attach` is used: `learner eval` needs neither."""
    if name == "attach":
        from learner.trainer.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
