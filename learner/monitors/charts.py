"""Line charts as inline SVG: no script, colors and fonts from the page's style, readable from 320 pixels width."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from statistics import fmean

#: Points drawn per series; longer series are averaged into this many buckets.
POINTS = 200
_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 8.0, 24.0

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """One series of a chart.

    Attributes:
        points: (step, value), by increasing step.
        look: line; dots, for noisy values; or marks, a line that emphasizes each of a few points.
        color: 1 to 4, defined by the page's style.
    """

    label: str
    points: Sequence[Point]
    look: str = "line"
    color: int = 1


def number(value: float) -> str:
    """Format with about three digits: 0.123, 12.3, 1,234, 2e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return power(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def power(value: float) -> str:
    """Format with two digits, or with one and a power of ten."""
    if 0.01 <= abs(value) < 1000:
        return f"{value:.2g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def chart(
    title: str,
    note: str,
    series: Sequence[Series],
    *,
    show: Callable[[float], str] = number,
    log: bool = False,
    unit_range: bool = False,
) -> str:
    """Draw a `<figure>`; returns "" without data.

    Args:
        note: a short explanation of the series.
        show: formats a value.
        log: use a logarithmic scale, without values that are not positive.
        unit_range: show the range 0 to 1 if all values lie in it. Otherwise, and by default, the range begins at 0 or
            at the lowest value, if that is negative.
    """
    drawn = []
    for s in series:
        points = [(x, y) for x, y in s.points if math.isfinite(y) and (y > 0 or not log)]
        points = points if s.look == "marks" and len(points) <= POINTS else bucketed(points)
        drawn.append(replace(s, points=[(x, math.log10(y)) for x, y in points] if log else points))
    if not (drawn := [s for s in drawn if s.points]):
        return ""
    text: Callable[[float], str] = (lambda y: show(10.0**y)) if log else show
    values = [y for s in drawn for _, y in s.points]
    last = max(1.0, *(x for s in drawn for x, _ in s.points))
    low, high = _range(values, log, unit_range)
    across = _scale(0.0, last, _LEFT, _WIDTH - _RIGHT)
    up = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    ticks = range(int(low), int(high) + 1, math.ceil((high - low) / 5)) if log else _ticks(low, high)
    parts = [_axes(ticks, last, across, up, text)]
    parts += [_line(s, across, up) for s in drawn]
    parts.append(_bands(drawn, across, text))
    legend = "".join(
        f'<li><span class="key c{s.color} {s.look}"></span>{escape(s.label)} '
        f"<b>{escape(text(s.points[-1][1]))}</b></li>"
        for s in drawn
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>'
        f'<ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def sparkline(values: Sequence[float]) -> str:
    """Draw the values as one line of at most 40 block characters."""
    if not values:
        return ""
    means = [y for _, y in bucketed([(float(i), value) for i, value in enumerate(values)], 40)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low)) if high > low else 0] for value in means)


def bucketed(points: Sequence[Point], count: int = POINTS) -> list[Point]:
    """Return at most `count` points, each the mean of neighboring ones."""
    if len(points) <= count:
        return list(points)
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    return [
        (fmean(x for x, _ in points[start:end]), fmean(y for _, y in points[start:end]))
        for start, end in pairwise(edges)
    ]


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values up to each value; fewer at the beginning."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """Map values from `low` to `high` to coordinates from `start` to `end`."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _range(values: Sequence[float], log: bool, unit_range: bool) -> Point:
    low, high = min(values), max(values)
    if log:
        low, high = math.floor(low), math.ceil(high)
        return low, max(high, low + 1)
    if unit_range and low >= 0 and high <= 1:
        return 0.0, 1.0
    low = min(low, 0.0)
    room = 0.05 * (high - low)
    return (low - room if low < 0 else low), (high + room if high > low else low + 1.0)


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(ticks: Sequence[float], last: float, across: Scale, up: Scale, show: Callable[[float], str]) -> str:
    """Draw the grid with its values, and the axis with its steps; the outer labels end where the axis does."""
    right = _WIDTH - _RIGHT
    parts = [f'<path class="axis" d="M{_LEFT:g} {_HEIGHT - _BOTTOM:g}H{right:g}"/>']
    for t in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT:g} {up(t):g}H{right:g}"/>')
        parts.append(f'<text x="{_LEFT - 5:g}" y="{up(t) + 3.5:g}" text-anchor="end">{escape(show(t))}</text>')
    for t in filter(float.is_integer, _ticks(0.0, last)):
        anchor = "start" if t == 0 else "end" if across(t) > right - 12 else "middle"
        parts.append(f'<text x="{across(t):g}" y="{_HEIGHT - 8:g}" text-anchor="{anchor}">{t:g}</text>')
    return "".join(parts)


def _line(series: Series, across: Scale, up: Scale) -> str:
    at = [(across(x), up(y)) for x, y in series.points]
    kind = f"c{series.color}"
    dots = "".join(f'<circle class="dot {kind}" cx="{x:g}" cy="{y:g}" r="1.8"/>' for x, y in at)
    if series.look == "dots":
        return dots
    path = f'<path class="line {kind}" d="M' + "L".join(f"{x:g} {y:g}" for x, y in at) + '"/>'
    if series.look == "marks":
        return path + "".join(f'<circle class="mark {kind}" cx="{x:g}" cy="{y:g}" r="3.5"/>' for x, y in at)
    return path if len(at) > 1 else dots


def _bands(series: Sequence[Series], across: Scale, show: Callable[[float], str]) -> str:
    """Draw one transparent band per step, whose tooltip shows the step's values."""
    values = defaultdict[float, list[str]](list)
    for s in series:
        for x, y in s.points:
            values[x].append(f"{s.label} {show(y)}")
    places = sorted(values)
    edges = [_LEFT, *(across((a + b) / 2) for a, b in pairwise(places)), _WIDTH - _RIGHT]
    height = _HEIGHT - _TOP - _BOTTOM
    return "".join(
        f'<rect class="band" x="{start:g}" y="{_TOP:g}" width="{max(end - start, 0):.1f}" height="{height:g}">'
        f"<title>{escape(f'step {round(x, 1):g}: ' + ', '.join(values[x]))}</title></rect>"
        for x, start, end in zip(places, edges, edges[1:], strict=False)
    )
