"""A picture of a run: reward of every step, evaluations before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learner.evaluation.statistics import wilson_interval
from learner.monitors.charts import trailing_mean
from learner.utils.atomic import atomic_file

BLUE, ORANGE, GREY = "#1f5fa8", "#c8551b", "#5f6570"


def write_curve(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    eval_before: tuple[float, int] | None,
    eval_after: tuple[float, int] | None,
    title: str,
) -> None:
    """Draw the reward of every step, and the evaluations before and after training, into a PNG.

    The moving average looks back only.

    Args:
        rows: the steps (metrics.jsonl), of which `step` and `reward` are read; steps without a reward are left out.
        eval_before, eval_after: mean score and number of questions, drawn with a 95% interval.
    """
    points = [(int(r["step"]), float(r["reward"])) for r in rows if r.get("reward") is not None]
    last = max((int(r["step"]) for r in rows), default=0)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), dpi=150, layout="constrained")  # no pyplot: no global state, no display
    axes = figure.add_subplot()
    if points:
        steps, rewards = zip(*points, strict=True)
        window = max(3, len(points) // 10)
        label = "sampled reward, mean of a step's batch"
        axes.plot(steps, rewards, "o", color=BLUE, alpha=0.3, markersize=3.5, markeredgewidth=0, label=label)
        label = f"its mean over the last {window} steps"
        axes.plot(steps, trailing_mean(rewards, window), color=BLUE, linewidth=2, label=label)
    evaluations = [(step, *e) for step, e in ((0, eval_before), (last, eval_after)) if e is not None]
    for number, (step, mean, n) in enumerate(evaluations):
        _draw_eval(axes, step, mean, n, None if number else f"held-out questions (n = {n}), 95% interval")
    _decorate(axes, title, last, [r for _, r in points] + [mean for _, mean, _ in evaluations])
    with atomic_file(Path(path)) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _draw_eval(axes: Any, step: int, mean: float, n: int, label: str | None) -> None:
    low, high = wilson_interval(mean, n)
    style = {"fmt": "D", "color": ORANGE, "markersize": 7, "capsize": 5, "linewidth": 1.8, "zorder": 5}
    axes.errorbar([step], [mean], yerr=[[mean - low], [high - mean]], label=label, clip_on=False, **style)
    # Above the interval, or below it where the title would be in the way: never on the curve between the two points.
    above = mean <= 0.85
    axes.annotate(
        f"{mean:.2f}",
        (step, high if above else low),
        xytext=(0, 5 if above else -5),
        textcoords="offset points",
        ha="center",
        va="bottom" if above else "top",
        color=ORANGE,
        fontsize=12,
        fontweight="bold",
        zorder=6,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _decorate(axes: Any, title: str, last: int, values: Sequence[float]) -> None:
    margin = max(1.0, 0.03 * last)
    axes.set_xlim(-margin, last + margin)
    # Scores between 0 and 1 get the full scale, so that a small gain does not look like a large one.
    if all(0 <= v <= 1 for v in values):
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
    if values:
        # Below the axes: inside, some curve visits every corner.
        axes.figure.legend(loc="outside lower center", ncol=2, frameon=False, fontsize=9)
