"""Arithmetic of `bench.step`: from the steps of a training to its row, from rows to what they show together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.measure import spread
from bench.common.report import Row, Told, aligned

TRL = "TRL server mode"
TURNS = "lockstep, S = 0, one GPU by turns"
COLUMNS = (
    "row",
    "n",
    "step s",
    "wait s",
    "sync s",
    "train s",
    "tokens/s",
    "server tok/s",
    "learner tok/s",
    "learner bubble",
    "server bubble",
)
#: What two GPUs have to show: S = 1 against the larger of generation and training alone, TRL against S = 1.
MOST_OF_LARGER, LEAST_OF_TRL = 1.1, 1.6
PARTS = (
    ("train_s", "training", "#2f6fb0"),
    ("sync_s", "bringing weights to the server", "#8c8c8c"),
    ("wait_s", "waiting for completions", "#e08a2c"),
)


def ours(max_staleness: int) -> str:
    """The row of a bound."""
    return f"lockstep, S = {max_staleness}"


@dataclass(frozen=True)
class Step:
    """One optimizer step, in seconds from the end of the one before.

    Attributes:
        wait: for which the trainer waited for completions.
        sync: for which it brought its weights to the server.
        idle: for which the server had nothing to generate; None: it generates only while the trainer waits.
        tokens: of the completions that were trained on.
    """

    seconds: float
    wait: float
    sync: float
    idle: float | None
    tokens: int

    @property
    def train(self) -> float:
        """Everything that the trainer does itself."""
        return self.seconds - self.wait - self.sync

    @property
    def server_idle(self) -> float:
        """Seconds without anything to generate."""
        return self.seconds - self.wait if self.idle is None else self.idle


def figures(steps: Sequence[Step]) -> dict[str, Any]:
    """The row of a training: medians, ranges and means of seconds; rates and bubbles over all steps together.

    The server's tokens per second are those while it has something to generate, the learner's those while it neither
    waits nor brings weights to the server. A bubble is the share of the time in which nothing is to be done.
    """
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    idle, wait = sum(step.server_idle for step in steps), sum(step.wait for step in steps)
    return {
        "n": len(steps),
        "step_s": with_mean([step.seconds for step in steps]),
        **{f"{part}_s": with_mean([getattr(step, part) for step in steps]) for part in ("wait", "sync", "train")},
        "idle_s": with_mean([step.server_idle for step in steps]),
        "tokens_per_step": tokens / len(steps),
        "tokens_per_s": tokens / seconds,
        "server_tokens_per_s": tokens / max(seconds - idle, 1e-9),
        "learner_tokens_per_s": tokens / max(sum(step.train for step in steps), 1e-9),
        "learner_bubble": wait / seconds,
        "server_bubble": idle / seconds,
    }


def with_mean(values: Sequence[float]) -> dict[str, float]:
    """Median, range and mean."""
    return {**spread(values), "mean": statistics.fmean(values)}


def together(rows: Sequence[Row]) -> dict[str, float]:
    """What several rows show: generation and training alone, S = 1 beside their larger, TRL beside S = 1.

    At S = 0 server and learner take turns on the same requests, so that each of them is measured alone there.
    """
    by_name = {row["row"]: row for row in rows if "step_s" in row}
    shown: dict[str, float] = {}
    ahead, alone, trl = by_name.get(ours(1)), by_name.get(ours(0)), by_name.get(TRL)
    if alone:
        shown["generation_alone_s"] = alone["wait_s"]["median"]
        shown["training_alone_s"] = alone["train_s"]["median"]
    if alone and ahead:
        larger = max(shown["generation_alone_s"], shown["training_alone_s"])
        shown["of_larger"] = ahead["step_s"]["median"] / larger
        shown["of_s0"] = ahead["step_s"]["median"] / alone["step_s"]["median"]
    if ahead and trl:
        shown["trl_of_s1"] = trl["step_s"]["median"] / ahead["step_s"]["median"]
    return shown


def reached(shown: dict[str, float]) -> bool | None:
    """Whether the two targets are met; None where they were not both measured."""
    if "of_larger" not in shown or "trl_of_s1" not in shown:
        return None
    return shown["of_larger"] <= MOST_OF_LARGER and shown["trl_of_s1"] >= LEAST_OF_TRL


class StepReport(Told):
    """Rows of trainings."""

    figure = "step_s"

    def line(self, row: Row) -> str:
        return step_line(row)

    def headline(self, done: Sequence[Row]) -> str:
        return headline(done, together(self.rows), self.machine["devices"])

    def document(self) -> dict[str, Any]:
        shown = together(self.rows)
        return super().document() | {"reached": reached(shown), "together": shown}


def headline(done: Sequence[Row], shown: dict[str, float], devices: Sequence[str]) -> str:
    """One sentence with the figures."""
    if not done:
        return "nothing was measured"
    first = done[0]
    text = (
        f"{first['shape']}, LoRA rank {first['rank']}, {first['batch']} completions of up to {first['tokens']} tokens "
        f"a step, on {', '.join(dict.fromkeys(devices))}: "
        + "; ".join(f"{row['row']} {row['step_s']['median']:.2f} s a step" for row in done)
    )
    if "of_larger" in shown:
        text += (
            f"; S = 1 takes {shown['of_larger']:.2f} times the larger of generation alone "
            f"({shown['generation_alone_s']:.2f} s) and training alone ({shown['training_alone_s']:.2f} s)"
        )
    if "trl_of_s1" in shown:
        text += f", TRL's server mode {shown['trl_of_s1']:.2f} times S = 1"
    return text


def step_line(row: Row) -> str:
    """A row in one line."""
    if "step_s" not in row:
        return f"{row['row']}: {'skipped: ' + row['skipped'] if 'skipped' in row else 'ERROR ' + row['error']}"
    return (
        f"{row['row']}: {_seconds(row['step_s'])} s a step, {row['tokens_per_s']:,.0f} tokens/s, bubble of the learner "
        f"{row['learner_bubble']:.0%}, of the server {row['server_bubble']:.0%}"
    )


def steps_table(rows: Sequence[Row]) -> str:
    """All rows with their columns aligned."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        if "step_s" not in row:
            why = (row.get("skipped") or row["error"]).splitlines()[0][:100]
            lines.append((row["row"], "0", why, *["-"] * (len(COLUMNS) - 3)))
            continue
        lines.append(
            (
                row["row"],
                str(row["n"]),
                *(_seconds(row[f"{part}_s"]) for part in ("step", "wait", "sync", "train")),
                *(f"{row[f'{who}tokens_per_s']:,.0f}" for who in ("", "server_", "learner_")),
                f"{row['learner_bubble']:.0%}",
                f"{row['server_bubble']:.0%}",
            )
        )
    return aligned(lines, right={1, 6, 7, 8, 9, 10})


def stacked(path: Path, rows: Sequence[Row], title: str) -> None:
    """Where the time of a step goes, a bar for every training, with generation and training alone as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in rows if "step_s" in row]
    figure = Figure(figsize=(8.5, 1.8 + 0.55 * len(done)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = [row["row"] for row in done]
    left = [0.0] * len(done)
    for part, label, color in PARTS:
        widths = [row[part]["mean"] for row in done]  # which add up to a step, as medians do not
        axes.barh(names, widths, 0.6, left=left, color=color, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    alone = next((row for row in done if row["row"] == ours(0)), None)
    for part, label, style in (("wait_s", "generation alone", "--"), ("train_s", "training alone", ":")):
        if alone:
            axes.axvline(alone[part]["mean"], color="black", linestyle=style, linewidth=1.2, label=label)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, mean")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    if done:
        figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def stop_ids(vocab: int, mean_tokens: int) -> list[int]:
    """Token ids that end a completion: about one sampled token in `mean_tokens` is one of them.

    Random weights give every token about the same probability, so lengths are geometric with this mean. The ids are
    spread over the vocabulary, above those with a meaning.
    """
    return list(range(3, vocab, mean_tokens))


def _seconds(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"
