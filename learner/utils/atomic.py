"""A directory that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_vacant(target: Path) -> bool:
    """Whether nothing would be replaced there: it does not exist, or is an empty directory."""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`; when the block has ended, it takes the place of what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp makes it private
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old)  # an empty directory may be replaced
            os.replace(building, target)
            shutil.rmtree(old)
        else:
            os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
