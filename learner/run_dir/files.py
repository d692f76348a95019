"""What a training leaves in its output_dir for whoever watches it. Needs no torch."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Every optimizer step, see `learner.step_metrics.StepReport`.
HISTORY_FILE = "metrics.jsonl"
#: What TRL logs every `logging_steps` and at every evaluation, by TRL's names; `step` is in each of them.
LOGS_FILE = "logs.jsonl"
#: Some completions of some steps, see `learner.monitors.samples`.
SAMPLES_FILE = "completions.jsonl"
#: The figures of a training that has ended.
SUMMARY_FILE = "train.json"
#: All of it for a browser.
PAGE_FILE = "run.html"


class JsonLines:
    """A file of JSON objects, one a line, each with the `step` it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keep what a resumed run had written up to `step`, forget the rest."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_lines(self.path) if entry["step"] <= step] if step else []
        whole = self.path.with_suffix(".tmp")  # a kill or a full disk must not cost what is there
        whole.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        whole.replace(self.path)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of such a file; none if it is not there.

    Lines that a kill or a full disk has cut off are left out, and what was then written behind them on the same line.
    """
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [entry for line in lines if (entry := _object(line)) is not None]


def finite(value: Any) -> float | None:
    """A number that can be drawn, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as it was or as it will be, never in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.tmp")
    try:
        whole.write_bytes(text.encode("utf-8", "replace"))  # a lone surrogate has no encoding
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def _object(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON; the file is there whole or not at all. NaN and infinity are refused."""
    text = json.dumps(dict(summary), indent=2, allow_nan=False) + "\n"
    _atomically(Path(path), lambda temporary: temporary.write_text(text))


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
