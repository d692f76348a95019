"""GPUs of this machine, as the driver tells them: torch, which takes seconds to import, is not asked."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace

_QUERY = "--query-gpu=index,uuid,name,memory.total,memory.used"


@dataclass(frozen=True)
class Gpu:
    """A visible GPU; `device` as CUDA_VISIBLE_DEVICES names it, memory in bytes."""

    device: str
    name: str
    total: float
    used: float


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES where that is set.

    One that is named there and that the driver does not tell about has a memory of 0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else [word for part in visible.split(",") if (word := part.strip())]
    if chosen is not None and "-1" in chosen:  # CUDA sees those before it
        chosen = chosen[: chosen.index("-1")]
    if chosen == []:
        return []
    try:
        command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.count(",") == 4]
    gpus = {uuid: Gpu(index, name, _bytes(total), _bytes(used)) for index, uuid, name, total, used in rows}
    if chosen is None:
        return list(gpus.values())

    def named(word: str) -> Gpu:
        """An index, or the beginning of a UUID; parts of a GPU (MIG) are not in this list."""
        same = (gpu for uuid, gpu in gpus.items() if gpu.device == word or uuid.startswith(word))
        return replace(next(same, Gpu(word, "a GPU", 0.0, 0.0)), device=word)

    return [named(word) for word in chosen]


def _bytes(mebibytes: str) -> float:
    return float(mebibytes) * 2**20 if mebibytes.replace(".", "", 1).isdigit() else 0.0  # "[N/A]" of some
