"""What `bench.pool` leaves behind: a row for every stretch between two events, and a picture of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.report import Row, Told, aligned

#: Seconds after an event that belong to it: what had begun on another set of servers comes to its end.
SETTLE_S = 4.0
COLUMNS = ("from s", "to s", "servers up", "tokens/s", "alone, summed", "ratio")


class FleetReport(Told):
    """Rows of stretches in which the same servers were up."""

    figure = "tokens_per_s"

    def take(self, records: Sequence[Row], alone: dict[str, float]) -> None:
        """Add a row for every stretch."""
        self.machine["alone_tokens_per_s"] = alone
        self.machine["records"] = list(records)
        for row in stretches(records, alone):
            self.add(row)

    def line(self, row: Row) -> str:
        if "tokens_per_s" not in row:
            return str(row.get("error"))
        return (
            f"{'+'.join(row['servers'])} up for {row['end'] - row['start']:.0f} s: {row['tokens_per_s']:.0f} tokens/s, "
            f"{row['ratio']:.1%} of what they give alone"
        )

    def headline(self, done: Sequence[Row]) -> str:
        if not done:
            return "nothing was measured"
        ratios = [row["ratio"] for row in done]
        return (
            f"on {', '.join(self.machine['devices'])}: while servers joined, were killed and came back, those that "
            f"were up gave {statistics.mean(ratios):.1%} of what they give alone (least {min(ratios):.1%} of "
            f"{len(done)} stretches)"
        )


def stretches(records: Sequence[Row], alone: dict[str, float]) -> list[dict[str, Any]]:
    """Tokens a second between events, against the sum of the servers that were up.

    Args:
        records: lines of a `EventLog`.
        alone: tokens/s of each server.
    """
    start = min(record["time"] for record in records)
    end = max(record["time"] for record in records if "tokens" in record)
    events = sorted((r for r in records if "event" in r), key=lambda r: r["time"])
    up: set[str] = set()
    edges: list[tuple[float, frozenset[str]]] = []
    for event in events:
        up = up | {event["server"]} if event["event"] == "serves" else up - {event["server"]}
        edges.append((event["time"], frozenset(up)))
    rows = []
    for (begin, who), following in zip(edges, [*(at for at, _ in edges[1:]), end], strict=True):
        first, last = int(begin + SETTLE_S) + 1, int(following)  # whole seconds
        if last - first < 5 or not who:
            continue
        tokens = sum(r["tokens"] for r in records if "tokens" in r and first <= r["time"] < last)
        rate, expected = tokens / (last - first), sum(alone[name] for name in who)
        rows.append(
            {
                "row": "+".join(sorted(who)),
                "servers": sorted(who),
                "start": first - start,
                "end": last - start,
                "tokens_per_s": rate,
                "expected": expected,
                "ratio": rate / expected,
                "ok": True,
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """All stretches."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    lines += [
        (
            f"{row['start']:.0f}",
            f"{row['end']:.0f}",
            row["row"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['expected']:.0f}",
            f"{row['ratio']:.1%}",
        )
        for row in rows
        if "tokens_per_s" in row
    ]
    return aligned(lines, right={0, 1, 3, 4, 5})


def plot(path: Path, records: Sequence[Row], alone: dict[str, float], title: str) -> None:
    """Tokens a second of every server over time, and when servers came and went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    start = min(record["time"] for record in records)
    tokens = [record for record in records if "tokens" in record]
    seconds = range(int(start) + 1, int(max(record["time"] for record in tokens)))
    rates: dict[str, list[float]] = {}
    for name in sorted(alone):
        by_second: dict[int, int] = {}
        for record in tokens:
            if record["server"] == name:
                by_second[int(record["time"])] = by_second.get(int(record["time"]), 0) + record["tokens"]
        rates[name] = [statistics.fmean(by_second.get(t, 0) for t in range(s - 2, s + 3)) for s in seconds]
    x = [second - start for second in seconds]
    axes.stackplot(
        x,
        list(rates.values()),
        labels=[f"server {name}" for name in rates],
        alpha=0.85,
        colors=["#2f6fb0", "#e08a2c", "#3a8f4d", "#8b5fbf"],
    )
    up: set[str] = set()
    expected: list[tuple[float, float]] = []
    for event in sorted((r for r in records if "event" in r), key=lambda r: r["time"]):
        name, what = event["server"], event["event"]
        up = up | {name} if what == "serves" else up - {name}
        at = event["time"] - start
        expected.append((at, sum(alone[n] for n in up)))
        if what == "serves" or what.startswith("lost"):
            axes.axvline(at, color="#555", linewidth=0.8, linestyle=":")
            axes.annotate(
                f"{name} {'up' if what == 'serves' else 'lost'}",
                (at, 1.0),
                xytext=(2, -2 - 9 * (len(up) % 3)),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7,
                va="top",
            )
    expected.append((x[-1], expected[-1][1]))
    axes.step(
        [at for at, _ in expected],
        [rate for _, rate in expected],
        where="post",
        color="black",
        linewidth=1.2,
        label="sum of what the servers that are up give alone",
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens a second, mean of 5 s")
    axes.set_ylim(0, 1.15 * max(*map(sum, zip(*rates.values(), strict=True)), *(rate for _, rate in expected)))
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(rates) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
