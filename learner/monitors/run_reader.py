"""Reads run directories for their page: what has been added since the last look, and what a training has begun anew."""

from __future__ import annotations

import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from learner.monitors.run_page import RunView
from learner.monitors.run_table import StepTable
from learner.monitors.samples import read_batches
from learner.run_dir.files import HISTORY_FILE, LOGS_FILE, SAMPLES_FILE, STATE_FILE, SUMMARY_FILE, is_step

#: Runs of a folder that are listed: the newest.
RUNS = 50
_GENERATIONS = itertools.count()


def find_runs(folder: Path) -> dict[str, Path]:
    """Return the runs at `folder`, itself or its subfolders, by name; of many the newest, in the order of their names.

    A run without a name of its own, `folder` itself, has the folder's.
    """
    if _is_run(folder):
        return {folder.resolve().name: folder}
    found = []
    with suppress(OSError):
        for child in folder.iterdir():
            with suppress(OSError):  # that this user may not read, or that has just gone
                if _is_run(child):
                    found.append((child.stat().st_mtime, child))
    newest = sorted(found, reverse=True)[:RUNS]
    return {child.name: child for child in sorted(child for _, child in newest)}


class RunReader:
    """One run directory as a `RunView`, which `refresh` brings up to date.

    Attributes:
        generation: another one for each table, whose rows have been read from the beginning.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.generation = folder, next(_GENERATIONS)
        self.view = RunView(name, state="")
        self._history, self._logs = _Tail(folder / HISTORY_FILE), _Tail(folder / LOGS_FILE)
        self._seen: dict[str, tuple[int, ...] | None] = {}

    def refresh(self) -> None:
        """Read what has changed; files that are missing, or cut off, are read as far as they go."""
        view = self.view
        if self._history.begins_anew() or self._logs.begins_anew():
            self._history.rewind()
            self._logs.rewind()
            view.table, self.generation = StepTable(), next(_GENERATIONS)
        for row in self._history.read():
            view.table.add_step(row)
        for row in self._logs.read():
            view.table.add_log(row)
        if self._changed(SAMPLES_FILE):
            view.batches = read_batches(self._folder / SAMPLES_FILE)
        if self._changed(STATE_FILE):
            self._read_state()
        written = [stamp[1] for name in (HISTORY_FILE, STATE_FILE) if (stamp := _stamp(self._folder / name))]
        view.updated = max(written, default=0) / 1e9
        if not view.settings and view.state == "" and (self._folder / SUMMARY_FILE).is_file():
            view.state = "finished"  # of a run without a page of its own

    def _read_state(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # other programs have a file of this name, too
            state = json.loads((self._folder / STATE_FILE).read_text(errors="replace"))
            run_id, model, now = (str(state[name]) for name in ("run_id", "model", "state"))
            servers = [row for row in state["servers"] if isinstance(row, dict)]
            settings = {k: dict(rows) for k, rows in dict(state["settings"]).items() if isinstance(rows, dict)}
            view = self.view
            view.run_id, view.model, view.state, view.servers, view.settings = run_id, model, now, servers, settings
            view.error = None if (error := state.get("error")) is None else str(error)

    def _changed(self, name: str) -> bool:
        before, self._seen[name] = self._seen.get(name), _stamp(self._folder / name)
        return before != self._seen[name]


class _Tail:
    """A file of JSON lines, read from where the last reading ended."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._file = path, 0, 0  # the inode

    def begins_anew(self) -> bool:
        """Return whether the file has been replaced, or is shorter than what was read of it."""
        if self._at == 0 or (stamp := _stamp(self._path)) is None:
            return False
        return stamp[0] != self._file or stamp[2] < self._at

    def rewind(self) -> None:
        self._at = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the rows of the lines that have been completed since; what is no row is left out."""
        try:
            with self._path.open("rb") as stream:
                self._file = os.fstat(stream.fileno()).st_ino
                stream.seek(self._at)
                data = stream.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        rows = []
        for line in whole.splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and is_step(row.get("step")):
                    rows.append(row)
        return rows


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (HISTORY_FILE, STATE_FILE))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return inode, time of the last change in nanoseconds, and size; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
