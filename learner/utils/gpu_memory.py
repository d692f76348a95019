"""Memory of the GPU that this process computes on."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """Return what tensors of this process may still take of a GPU, in bytes; 0 of a CPU."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)
