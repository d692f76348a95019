"""A generation batch beside a checkpoint that was written inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.errors import InvalidRequest


def save_batches(path: Path, batches: list[dict[str, Any]]) -> None:
    """Write the slices of a generation batch.

    Args:
        batches: one dict of tensors (or None) for each slice.

    Raises:
        LockstepError: `invalid_request` for anything but tensors.
    """
    tensors = {}
    for index, batch in enumerate(batches):
        for name, value in batch.items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise InvalidRequest(
                    f"{name} of a generation batch is no tensor and cannot be checkpointed: set save_steps to a "
                    "multiple of the optimizer steps per generation batch"
                )
            tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, path)


def load_batches(path: Path, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """What `save_batches` wrote, on `device`."""
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        batches.setdefault(int(index), {})[name] = tensor.to(device)
    return [batches[index] for index in sorted(batches)]
