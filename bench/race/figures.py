"""Arithmetic of races: where a curve reaches an accuracy, curves of several seeds as one with a band, rows together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.common.report import Row

#: An evaluation: step, samples, seconds of the race's clock, and the accuracy on held-out questions.
Point = Mapping[str, float]


@dataclass(frozen=True)
class Band:
    """Evaluations after the same step of trainings with several seeds: means, and the accuracy's standard deviation.

    Attributes:
        deviation: of the accuracy; 0 for a single seed.
    """

    step: int
    samples: float
    seconds: float
    accuracy: float
    deviation: float


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Band]:
    """Return the band of curves, at the steps at which all of them were evaluated."""
    by_step = [{int(point["step"]): point for point in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    bands = []
    for step in steps:
        points = [curve[step] for curve in by_step]
        samples, seconds, accuracy = ([point[key] for point in points] for key in ("samples", "seconds", "accuracy"))
        deviation = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        mean = statistics.fmean
        bands.append(Band(step, mean(samples), mean(seconds), mean(accuracy), deviation))
    return bands


def reached(curve: Sequence[Point], key: str, target: float) -> float | None:
    """Return where a curve first has an accuracy of `target`, on straight lines between evaluations; None: nowhere.

    Args:
        key: of what lies on the other axis: seconds, samples or step.

    Example:
        assert reached([{"step": 0, "accuracy": 0.2}, {"step": 10, "accuracy": 0.6}], "step", 0.5) == 7.5
    """
    before: Point | None = None
    for point in curve:
        if point["accuracy"] >= target:
            if before is None:
                return point[key]
            part = (target - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return before[key] + part * (point[key] - before[key])
        before = point
    return None


def by_name(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return measured rows by their values of these keys, in the order in which they first occur."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "points" in row:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def shared_seeds(rows: Sequence[Row], row: str, other: str) -> list[list[Row]]:
    """Return the rows of two names, of the seeds that both have."""
    found = [{each["seed"]: each for each in rows if each["row"] == name and "points" in each} for name in (row, other)]
    seeds = [seed for seed in found[0] if seed in found[1]]
    return [[mine[seed] for seed in seeds] for mine in found]


def target_accuracy(rows: Sequence[Row], peer: str) -> float:
    """Return the final accuracy of the peer, less its spread; without it, the lowest of all names.

    Equally good trainings end above and below each other by chance: the spread is the standard deviation over seeds.
    """
    by_row = {name: mine for (name,), mine in by_name(rows, "row").items()}
    bounds = {name: mean - deviation for name, mine in by_row.items() for mean, deviation in [final(mine)]}
    return bounds[peer] if peer in bounds else min(bounds.values())


def final(rows: Sequence[Row]) -> tuple[float, float]:
    """Return mean and standard deviation of the last accuracies; 0 for a single one."""
    last = [row["points"][-1]["accuracy"] for row in rows]
    return statistics.fmean(last), statistics.stdev(last) if len(last) > 1 else 0.0


def summary(rows: Sequence[Row], target: float, *keys: str) -> list[dict[str, Any]]:
    """Return a row for all seeds of the same `keys`: final accuracy, what the target took, rates and bubbles."""
    summed = []
    for values, mine in by_name(rows, *keys).items():
        mean, deviation = final(mine)
        curve = [asdict(band) for band in mean_curve([row["points"] for row in mine])]
        rates = ("tokens_per_s", "learner_bubble", "server_bubble")
        known = {name: [row[name] for row in mine if name in row] for name in rates}
        means = {name: statistics.fmean(values) for name, values in known.items() if values}
        summed.append(
            dict(zip(keys, values, strict=True))
            | {
                "seeds": len(mine),
                "before": statistics.fmean(row["points"][0]["accuracy"] for row in mine),
                "final": mean,
                "deviation": deviation if len(mine) > 1 else None,
                "target": target,
                "seconds_to_target": reached(curve, "seconds", target),
                "samples_to_target": reached(curve, "samples", target),
                "seconds": curve[-1]["seconds"] if curve else None,
                "step_s": statistics.fmean(row["step_s"]["mean"] for row in mine),
                **means,
            }
        )
    return summed


def against(rows: Sequence[Row], row: str, peer: str) -> dict[str, float]:
    """Return what a row took to the peer's final accuracy, as shares of what that took itself; by their mean curves.

    Only seeds that both have count. Both are looked at where they first had that accuracy (`seconds`, `samples`), and
    where they first had `target_accuracy`, which is less by its spread (`seconds_to_target`, `samples_to_target`).
    """
    own, other = shared_seeds(rows, row, peer)
    if not own:
        return {}
    shares = dict[str, float]()
    curves = [[asdict(band) for band in mean_curve([one["points"] for one in mine])] for mine in (own, other)]
    for end, target in {"": final(other)[0], "_to_target": target_accuracy(other, peer)}.items():
        for key in ("seconds", "samples"):
            mine, theirs = (reached(curve, key, target) for curve in curves)
            if mine is not None and theirs:
                shares[key + end] = mine / theirs
    return shares
