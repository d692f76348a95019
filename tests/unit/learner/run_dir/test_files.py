"""Histories and summaries in output_dir survive kills and full disks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.run_dir.files import JsonLines, finite, write_summary


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_history_keeps_what_its_checkpoint_had(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    lines.insert(1, '{"step": 1, "rew{"step": 2}')  # cut off by a full disk, and written on
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "rew')
    JsonLines(tmp_path / "metrics.jsonl").begin(2)
    assert _steps(tmp_path) == [1, 2]


def test_a_history_that_cannot_be_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        whole(path, data[:3])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        JsonLines(tmp_path / "metrics.jsonl").begin(1)
    assert _steps(tmp_path) == [1]


def test_summary_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 3})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(path, {"gap": float("nan")})
    assert json.loads(path.read_text()) == {"steps": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_lines_of_no_step_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": "1"}\n{"step": null}\n{"step": true}\n{"step": 2.0}\n{"step": -1}\n{"step": 1}\n[1]\n')
    JsonLines(path).begin(3)
    assert _steps(tmp_path) == [1]


def test_what_is_no_finite_number() -> None:
    assert [finite(value) for value in (1, 0.5, 10**400, float("inf"), "1", None)] == [1.0, 0.5, *[None] * 4]
