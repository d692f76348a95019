"""Examples as processes of their own, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.support.forked import FORKING, REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def run_example(command: list[str], folder: Path, **environment: Any) -> str:
    """Run an example from `folder`, with settings in its environment, and return what it printed."""
    ours = {"PYTHONPATH": FORKING, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, "STEPS": 2}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **{name: str(value) for name, value in {**ours, **environment}.items()}},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout
