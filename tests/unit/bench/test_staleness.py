"""What bench.staleness reads and writes down; a finished training stands in for one."""

from __future__ import annotations

import json
from pathlib import Path

from bench.staleness import StalenessBench


def test_finished_trainings_become_rows_a_sentence_and_a_picture(tmp_path: Path) -> None:
    bench = StalenessBench(["--seeds", "42,43", "--work-dir", str(tmp_path), "--plot", str(tmp_path / "a.png")])
    for bound in (0, 1):
        for seed, after in ((42, 0.5), (43, 0.7)):
            folder = tmp_path / f"s{bound}-seed{seed}"
            folder.mkdir()
            summary = {"eval_before": 0.25, "eval_after": after, "eval_questions": 64, "train_seconds": 100.0}
            summary |= {"steps": 2, "max_drift_kl": 0.01, "lags": [0, bound]}
            (folder / "summary.json").write_text(json.dumps(summary))
            steps = [{"seconds": 1.5, "reward": 0.25}, {"seconds": 2.5, "reward": 0.5}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert bench.main() == 0
    assert [(row["max_staleness"], row["seed"]) for row in bench.rows] == [(0, 42), (1, 42), (0, 43), (1, 43)]
    assert bench.rows[0]["step_seconds"] == [1.5, 2.5]
    assert "S = 1: 0.600 (standard deviation 0.141) right after 100 s, 2 seeds" in bench.document()["headline"]
    assert bench.table().splitlines()[3].split() == [
        "1",
        "42",
        "0.250",
        "0.500",
        "2",
        "100",
        "2.0",
        "1.0e-02",
        "[0,",
        "1]",
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
