"""Files of a run's output_dir: their names, their JSON lines, and the summary."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from learner.utils.atomic import write_atomically
from shared.weights import ServerState

#: Every optimizer step, see `learner.step_metrics.StepReport`.
HISTORY_FILE = "metrics.jsonl"
#: What TRL logs every `logging_steps` and at every evaluation, by TRL's names; `step` is in each of them.
LOGS_FILE = "logs.jsonl"
#: What the run's page shows beside rows and completions: name, model, state, error, servers, settings.
STATE_FILE = "run.json"
#: Selected completions, see `learner.monitors.samples`.
SAMPLES_FILE = "completions.jsonl"
#: Totals of a finished training.
SUMMARY_FILE = "train.json"
#: The same with evaluations before and after, as the demo writes it.
EVALS_FILE = "summary.json"
#: The run as a web page.
PAGE_FILE = "run.html"
#: The run's secret and fence, see `learner.run_dir.lease`.
LEASE_FILE = "lease.json"
#: Directories of the trained adapter, and of the model that it was merged into.
FINAL_ADAPTER, MERGED = "adapter", "merged"


class JsonLines:
    """A file of JSON objects, one a line, each with the `step` it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Drop entries after `step`, the step that training resumes from; with 0 start an empty file."""
        kept = [entry for entry in read_lines(self.path) if entry["step"] <= step] if step else []
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def is_step(value: Any) -> bool:
    """Return whether a value can be the number of a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `JsonLines` file, or none if it does not exist.

    Skips lines cut off by a kill or a full disk, together with what was later appended to the same line, and objects of
    no step, such as another program's.
    """
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and is_step(entry.get("step")):
                entries.append(entry)
    return entries


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a finite number."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond 64-bit floats
        return None
    return number if math.isfinite(number) else None


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON, atomically; raises ValueError if it holds NaN or infinity."""
    write_atomically(Path(path), json.dumps(dict(summary), indent=2, allow_nan=False) + "\n")


def provenance(
    model: str,
    revision: str | None,
    task: str,
    base_weights: str | None,
    server: ServerState,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the summary's record of model, task, fingerprint of the base, and versions on both sides."""
    versions = {"vllm": server.vllm_version}
    for package in ("lockstep-rl", "trl", "peft", "transformers", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # of a source tree that was never installed
            continue
    record = {"model": model, "model_revision": revision, "base_weights": base_weights, "task": task}
    return record | {"trust_remote_code": trust_remote_code, "versions": versions}
