from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common.report import Report, headline, plot, table


def row(name: str, seconds: float | None, rank: int = 8, **more: Any) -> dict[str, Any]:
    about = {"shape": "tiny", "rank": rank, "row": name, "parameters": 1, "ok": True}
    if seconds is None:
        return {**about, **more}
    spread = {"median": seconds, "min": seconds / 2, "max": seconds * 2}
    figures = {"bytes": 1_000_000, "n": 5, "push_s": spread, "first_token_s": spread}
    return {**about, **figures, "parts_median_s": {"install": 0.001}, **more}


ROWS = [
    row("ours", 0.01),
    row("a peer with a long name", 1.5),
    row("third", None, skipped="needs two GPUs"),
    row("fourth", None, ok=False, error="ValueError: no\nmore of it"),
]


def test_table_columns_line_up() -> None:
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert len({text.index("0.0100") for text in lines if "0.0100" in text}) == 1
    column = lines[0].index("push s")
    assert lines[2][column:].startswith("0.0100 (0.0050-0.0200)")
    assert lines[3][column:].startswith("1.5000 (0.7500-3.0000)")
    assert "skipped: needs two GPUs" in lines[4]
    assert "error: ValueError: no" in lines[5]
    assert "more of it" not in lines[5]


def test_headline_takes_the_group_with_most_rows_and_orders_by_time() -> None:
    text = headline([row("peer", 1.5), row("ours", 0.01), row("ours", 0.02, rank=32)], ["H", "H"])
    assert "tiny, LoRA rank 8, on H:" in text
    assert text.index("ours 0.0100") < text.index("peer 1.5000")
    assert headline([ROWS[2]], []) == "nothing was measured"


def test_every_row_leaves_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "sync.json"
    report = Report(path, {"devices": ["H"]})
    report.add(ROWS[0])
    report.add(ROWS[2])
    document = json.loads(path.read_text())
    assert set(document) == {"headline", "ok", "machine", "rows"}
    assert document["ok"]
    assert [r["row"] for r in document["rows"]] == ["ours", "third"]
    report.add(ROWS[3])
    assert json.loads(path.read_text())["ok"] is False
    assert [p.name for p in path.parent.iterdir()] == ["sync.json"]


def test_a_row_measured_again_takes_the_place_of_the_old_one() -> None:
    report = Report(None, {}, [row("ours", 5.0)])
    report.add(row("ours", 0.01))
    assert [r["first_token_s"]["median"] for r in report.rows] == [0.01]


def test_only_skipped_rows_are_not_ok() -> None:
    report = Report(None, {}, [ROWS[2]])
    assert report.document()["ok"] is False


def test_plot(tmp_path: Path) -> None:
    plot(tmp_path / "sync.png", ROWS, "title")
    assert (tmp_path / "sync.png").read_bytes().startswith(b"\x89PNG")
    plot(tmp_path / "empty.png", [], "title")
