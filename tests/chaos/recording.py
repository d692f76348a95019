"""What went from the learner to the servers, on the disk: the adapters it pushed last."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from shared.adapter_file import header_length, parse_header
from shared.weights import WeightVersion

_BLOBS_KEPT = 60
#: One for all of a process: each store of it has a file of its own.
_count = itertools.count()


class Pushes:
    """The adapters pushed last, as files FENCE.STEP.blob; processes and threads may store at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "pushes"
        self._folder.mkdir(exist_ok=True)

    def store(self, blob: bytes) -> WeightVersion:
        """Keep an adapter; return its version."""
        version = parse_header(blob[8 : 8 + header_length(blob)]).manifest.version
        temporary = self._folder / f"{os.getpid()}-{next(_count)}.tmp"
        temporary.write_bytes(blob)
        temporary.rename(self._folder / f"{version.fence:05d}.{version.step:07d}.blob")
        for old in sorted(self._folder.glob("*.blob"))[:-_BLOBS_KEPT]:
            old.unlink(missing_ok=True)
        return version

    def stored(self) -> dict[tuple[int, int], Path]:
        """Return the adapters, by fence and step."""
        found = {}
        for path in sorted(self._folder.glob("*.blob")):
            fence, step = path.stem.split(".")
            found[int(fence), int(step)] = path
        return found
