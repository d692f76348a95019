"""The demo's picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.demo.curve import write_curve


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "reward": None}], [{"step": i, "reward": i - 3.0} for i in range(9)]]
)
@pytest.mark.parametrize("evals", [[], [(0, 0.2), (8, 0.9)]])
def test_any_run_gives_a_picture(rows: list, evals: list, tmp_path: Path) -> None:
    path = tmp_path / "new" / "curve.png"
    write_curve(path, rows, evals, 64, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]
