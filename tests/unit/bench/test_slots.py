"""What bench.slots asks for and writes down; nothing is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.slots import SlotsBench, name_of, server_flags


def row(count: int, **more: Any) -> dict[str, Any]:
    spread = {"median": 0.1 * count, "min": 0.0, "max": 1.0}
    figures = {"pace": 2.0, "n": 20, "push_s": spread, "wait_s": spread, "tokens_per_s_pushing": 900.0, "ratio": spread}
    about = {"row": name_of(count), "slots": count, "shape": "tiny", "rank": 8, "requests": 8, "ok": True}
    return {**about, **(more or {**figures, "slot_mib": 0.0 if count == 1 else 1.5})}


def test_servers() -> None:
    assert server_flags(1) == ("--apply", "merge")
    assert server_flags(3) == ("--slots-per-run", "3")


def test_rows_become_a_file_a_table_and_a_sentence(tmp_path: Path) -> None:
    bench = SlotsBench(["--json", str(tmp_path / "slots.json")])
    bench.machine = {"devices": ["H"]}
    for each in (row(1), row(3), row(2, ok=False, error="RuntimeError: no\nmore")):
        bench.add(each, {})
    document = json.loads((tmp_path / "slots.json").read_text())
    assert set(document) == {"headline", "ok", "machine", "rows"}
    assert document["ok"] is False
    assert document["headline"].startswith("on H: tiny rank 8, 8 requests, one place (--apply merge): 2 pushes per")
    lines = bench.table().splitlines()
    assert len(lines) == 2 + 3
    assert lines[3].endswith("4.5")
    assert lines[2].endswith("-")
    assert "RuntimeError: no" in lines[4]
    assert "more" not in lines[4]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--slots", "0,2"], "1 or more"),
        (["--paces", "0"], "more than 0"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        SlotsBench(flags)
    assert word in capsys.readouterr().err
