"""The numbers of a run, for its page: one row for each step, or for some neighboring steps of a long run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from learner.run_dir.files import finite

#: Most rows of a table; with more steps, rows are of 2, 4, 8 ... steps each.
ROWS = 400
#: Reward functions shown; most columns of other kinds are known by name.
_FUNCTIONS = 12
#: Of TRL's logs; rows of `metrics.jsonl` are shown as they are.
_LOGGED = (
    "loss",
    "learning_rate",
    "entropy",
    "kl",
    "grad_norm",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "eval_reward",
)
#: What a step waited for, and the share of the step that is shown of it.
_SHARES = {
    "wait_seconds": "wait_share",
    "reward_wait_seconds": "reward_share",
    "push_seconds": "push_share",
    "idle_seconds": "idle_share",
}

#: A cell on the page: nothing, a value, or [mean, lowest, highest] of several.
Cell = float | list[float] | None


@dataclass
class _Row:
    revision: int = 0
    #: Column -> number, sum, lowest and highest of its values.
    cells: dict[str, tuple[int, float, float, float]] = field(default_factory=dict)


class StepTable:
    """Rows of equal ranges of steps, which become twice as wide whenever there are more than `ROWS`.

    Attributes:
        width: steps of a row: row `i` covers steps `i * width` to `(i + 1) * width - 1`.
        last: the newest value of every column, and of `max_steps`.
        totals: sums of the columns that can be summed, over all steps.
        steps: reported steps.
    """

    def __init__(self) -> None:
        self.width, self.steps = 1, 0
        self.last: dict[str, float] = {}
        self.totals = defaultdict[str, float](float)
        self._columns: list[str] = []
        self._rows: dict[int, _Row] = {}
        self._revision = 0
        self._tokens: float | None = 0.0  # completion tokens when the last generation batch had come
        self._since = 0.0  # seconds since then

    def add_step(self, report: Mapping[str, Any]) -> None:
        """Add a row of `metrics.jsonl`, see `learner.step_metrics.StepReport`."""
        drift = report.get("drift")
        parts = drift.items() if isinstance(drift, Mapping) else ()
        values = {**report, **{f"drift_{name}": value for name, value in parts}}
        values.update(self._derived(values))
        self.steps += 1
        for name in ("seconds", "wait_seconds"):
            self.totals[name] += finite(report.get(name)) or 0.0
        self._add(report["step"], values)

    def add_log(self, logs: Mapping[str, Any]) -> None:
        """Add a row of `logs.jsonl`."""
        names = [name for name in logs if name in _LOGGED or (name[:8] == "rewards/" and name[-5:] == "/mean")]
        functions = sum(name.startswith("rewards/") for name in self._columns)
        new = [name for name in names if name.startswith("rewards/") and name not in self._columns]
        left_out = set(new[max(_FUNCTIONS - functions, 0) :])
        self._add(logs["step"], {name: logs[name] for name in names if name not in left_out})

    def changes(self, since: tuple[int, int] | None = None) -> tuple[tuple[int, int], dict[str, Any] | None]:
        """Return where the table is now, and for `where an earlier call was` what has changed; None if nothing.

        The changes replace rows of the same index, or the whole table with `anew`.
        """
        now = (self.width, self._revision)
        anew = since is None or since[0] != self.width or since[1] > self._revision
        after = -1 if since is None or anew else since[1]
        rows = [
            [index, *(_cell(row.cells.get(name)) for name in self._columns)]
            for index, row in sorted(self._rows.items())
            if row.revision > after
        ]
        if not (rows or anew):
            return now, None
        return now, {"anew": anew, "width": self.width, "columns": self._columns, "rows": rows}

    def _derived(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the shares of a step, and the tokens per second since the generation batch before."""
        seconds, found = finite(values.get("seconds")), dict[str, float]()
        if not seconds:
            return found
        for name, share in _SHARES.items():
            if (part := finite(values.get(name))) is not None:
                found[share] = min(part / seconds, 1.0)
        self._since += seconds
        if (tokens := finite(values.get("completion_tokens"))) is None or tokens == self._tokens:
            return found
        if (self._tokens is not None and values["step"] > 1) or values["step"] == 1:
            new = tokens - (self._tokens or 0.0)
            if new > 0:
                found["trained_tokens_per_second"] = new / self._since
        self._tokens, self._since = tokens, 0.0
        return found

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        while step // self.width >= ROWS:
            self._widen()
        self._revision += 1
        for name, value in values.items():
            if (number := finite(value)) is None:
                continue
            self.last[name] = number
            if name not in ("step", "max_steps"):
                row = self._rows.setdefault(step // self.width, _Row())
                row.revision = self._revision
                row.cells[name] = _merged(row.cells.get(name), (1, number, number, number))
                if name not in self._columns:
                    self._columns.append(name)

    def _widen(self) -> None:
        rows: dict[int, _Row] = {}
        for index, row in self._rows.items():
            wide = rows.setdefault(index // 2, _Row())
            wide.revision = max(wide.revision, row.revision)
            for name, cell in row.cells.items():
                wide.cells[name] = _merged(wide.cells.get(name), cell)
        self.width, self._rows = 2 * self.width, rows


def _merged(
    a: tuple[int, float, float, float] | None, b: tuple[int, float, float, float]
) -> tuple[int, float, float, float]:
    return b if a is None else (a[0] + b[0], a[1] + b[1], min(a[2], b[2]), max(a[3], b[3]))


def _cell(cell: tuple[int, float, float, float] | None) -> Cell:
    if cell is None:
        return None
    count, total, low, high = cell
    mean = _short(total / count)
    return mean if low == high else [mean, _short(low), _short(high)]


def _short(value: float) -> float:
    """Round to six digits, which nobody sees and halves the page."""
    return float(f"{value:.6g}")
