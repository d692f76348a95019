"""The curve and the summary of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.demo.curve import write_curve
from learner.evaluation.statistics import EvalPoint
from learner.monitors.charts import trailing_mean
from learner.run_dir.files import write_summary


def test_interval_is_wilsons() -> None:
    # Published example: 15 of 148 gives 0.0624 to 0.1605 (Newcombe 1998, method 3: 81 of 263 gives 0.2553 to 0.3662).
    low, high = EvalPoint(81 / 263, 263).interval()
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert EvalPoint(0.0, 128).interval()[0] == 0.0
    assert EvalPoint(1.0, 128).interval()[1] == 1.0


def test_trailing_mean_never_looks_ahead() -> None:
    assert trailing_mean([1.0, 0.0, 0.0, 9.0], 2) == [1.0, 0.5, 0.0, 4.5]


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "reward": None}], [{"step": i, "reward": i - 3.0} for i in range(9)]]
)
def test_any_run_gives_a_picture(rows: list, tmp_path: Path) -> None:
    path = tmp_path / "new" / "curve.png"
    write_curve(path, rows, (0.2, 128), EvalPoint(0.9, 128), "title")
    write_curve(path, rows, None, None, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]


def test_summary_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 3})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(path, {"gap": float("nan")})
    assert json.loads(path.read_text()) == {"steps": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
