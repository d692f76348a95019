"""How PyTorch's allocator serves passes of many sizes."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger("lockstep.passes")

#: Where a user sets the allocator; the second is the name since torch 2.10.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def let_segments_grow(device: torch.device) -> None:
    """Let the allocator enlarge segments of GPU memory, instead of keeping one for every size of pass that has come.

    Only in this process: the environment would reach servers and agents, and vLLM's sleep mode refuses such segments.
    Where the user has set the allocator, or torch does not know how, nothing is changed.
    """
    if device.type != "cuda" or any(name in os.environ for name in VARIABLES):
        return
    choose = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    choose = choose or getattr(torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings", None)
    try:
        if choose:
            choose("expandable_segments:True")
    except RuntimeError as error:
        logger.info("segments of GPU memory do not grow: %s", error)
