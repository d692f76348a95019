"""The demo's picture: reward per step, and the evaluations on held-out questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learner.evaluation.statistics import wilson_interval
from learner.monitors.charts import trailing_mean
from learner.utils.atomic import atomic_file

BLUE, ORANGE, GREY = "#1f5fa8", "#c8551b", "#5f6570"


def write_curve(
    path: Path, rows: Sequence[Mapping[str, Any]], evals: Sequence[tuple[int, float]], questions: int, title: str
) -> None:
    """Plot the reward of every step, and the evaluations, to a PNG file.

    Args:
        rows: the steps (metrics.jsonl), of which `step` and `reward` are read; those without a reward are left out.
        evals: step and mean score of the held-out questions, drawn with their 95% intervals.
        questions: number of held-out questions.
    """
    points = [(int(r["step"]), float(r["reward"])) for r in rows if r.get("reward") is not None]
    last = max((int(r["step"]) for r in rows), default=0)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), dpi=150, layout="constrained")  # no pyplot: no global state, no display
    axes: Any = figure.add_subplot()
    if points:
        steps, rewards = zip(*points, strict=True)
        window = max(3, len(points) // 10)
        label = "sampled reward, mean of a step's batch"
        axes.plot(steps, rewards, "o", color=BLUE, alpha=0.3, markersize=3.5, markeredgewidth=0, label=label)
        label = f"its mean over the last {window} steps"
        axes.plot(steps, trailing_mean(rewards, window), color=BLUE, linewidth=2, label=label)
    if evals:
        _draw_evals(axes, evals, questions)
    margin = max(1.0, 0.03 * last)
    axes.set_xlim(-margin, last + margin)
    # Scores between 0 and 1 get the full scale, so that a small gain does not look large.
    if all(0 <= value <= 1 for value in (*(score for _, score in evals), *(reward for _, reward in points))):
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
    axes.set_xlabel("optimizer step", color=GREY)
    axes.set_ylabel("score", color=GREY)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color("#c5c9d0")
    # Below the axes: inside them, any corner may be covered by a curve.
    figure.legend(loc="outside lower center", ncol=2, frameon=False, fontsize=9)
    with atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _draw_evals(axes: Any, evals: Sequence[tuple[int, float]], questions: int) -> None:
    steps, means = [step for step, _ in evals], [mean for _, mean in evals]
    bounds = [wilson_interval(mean, questions) for mean in means]
    errors = [[abs(mean - bound[side]) for mean, bound in zip(means, bounds, strict=True)] for side in (0, 1)]
    label = f"held-out questions (n = {questions}), 95% interval"
    style = {"fmt": "D", "markersize": 7, "capsize": 5, "linewidth": 1.8, "zorder": 5, "clip_on": False}
    axes.errorbar(steps, means, yerr=errors, color=ORANGE, label=label, **style)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    font = {"color": ORANGE, "fontsize": 12, "fontweight": "bold", "ha": "center"}
    for step, mean, (low, high) in zip(steps, means, bounds, strict=True):
        # Above the interval, or below it near the title; beside it would hide the curve.
        at, offset, va = (high, 5, "bottom") if mean <= 0.85 else (low, -5, "top")
        place = {"xytext": (0, offset), "textcoords": "offset points", "va": va}
        axes.annotate(f"{mean:.2f}", (step, at), **place, **font, bbox=box, zorder=6)
