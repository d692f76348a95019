"""Reading run directories: files of other programs, which may have the same names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.monitors.run_reader import RunReader

STATE = {"run_id": "r", "model": "m", "state": "training", "servers": [{"url": "u"}], "settings": {"LoRA": {"r": 8}}}


def test_the_state_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(STATE))
    reader = RunReader(tmp_path, "name")
    reader.refresh()
    view = reader.view
    assert (view.run_id, view.model, view.state) == ("r", "m", "training")
    assert (view.servers, view.settings) == ([{"url": "u"}], {"LoRA": {"r": 8}})


@pytest.mark.parametrize(
    "state",
    [[], 5, {"name": "x"}, {**STATE, "servers": None}, {**STATE, "settings": 5}, {**STATE, "settings": [1]}],
)
def test_a_state_of_another_program_is_left_out(tmp_path: Path, state: object) -> None:
    (tmp_path / "run.json").write_text(json.dumps(state))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    reader = RunReader(tmp_path, "name")
    reader.refresh()
    assert (reader.view.run_id, reader.view.servers) == ("name", ())
    assert reader.view.table.last["reward"] == 0.5
