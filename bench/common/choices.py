"""What the flags of a bench mean here: which of its rows, which devices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from bench.common.report import cpu_name
from bench.common.servers import visible_device


def pick_rows(names: str | None, there: Sequence[str]) -> list[str]:
    """Rows whose names begin with one of a comma-separated list; all of them without one.

    Raises:
        ValueError: a name that no row begins with.
    """
    asked = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in asked:
        if not any(row.startswith(name) for row in there):
            raise ValueError(f"unknown row {name!r}; there are {'; '.join(there)} (their beginnings are enough)")
    return [row for row in there if not asked or row.startswith(tuple(asked))]


def pick_devices(options: argparse.Namespace) -> tuple[list[str], str, str | None]:
    """Names of the devices, the learner's device, the server's CUDA_VISIBLE_DEVICES."""
    if not torch.cuda.is_available():
        return [cpu_name()], "cpu", None
    last = torch.cuda.device_count() - 1
    learner, server = min(options.learner_gpu, last), min(options.server_gpu, last)
    torch.cuda.set_device(learner)
    names = [f"{torch.cuda.get_device_name(learner)} (learner)", f"{torch.cuda.get_device_name(server)} (server)"]
    return names, f"cuda:{learner}", visible_device(server)
