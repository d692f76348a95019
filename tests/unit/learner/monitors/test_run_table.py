"""The numbers of a run: bounded, and right."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from learner.monitors.run_page import CHARTS, RunView, html_json, render
from learner.monitors.run_table import ROWS, StepTable
from tests.support.made_up_run import batch_of, logs_of, made_up_run, row_of


def _filled(steps: int) -> StepTable:
    table = StepTable()
    for step in range(1, steps + 1):
        table.add_step(row_of(step, steps))
        for logs in logs_of(row_of(step, steps)):
            table.add_log(logs)
    return table


def test_a_long_run_has_a_page_of_the_same_size() -> None:
    """10,000 steps take no more room than some hundred; the completions have their own bound."""
    short, long = made_up_run(ROWS - 1), made_up_run(10_000)
    rows = long.table.changes()[1]["rows"]
    assert len(rows) <= ROWS
    long.batches = short.batches
    assert len(render({"r": long})) < 2.5 * len(render({"r": short}))


def test_rows_of_several_steps_have_mean_and_extremes() -> None:
    table = _filled(1000)
    changes = table.changes()[1]
    assert table.width == 4
    at = changes["columns"].index("reward") + 1
    rows = {row[0]: row[at] for row in changes["rows"]}
    rewards = [row_of(step, 1000)["reward"] for step in range(400, 404)]
    assert rows[100] == [
        pytest.approx(fmean(rewards), rel=1e-5),
        pytest.approx(min(rewards), rel=1e-5),
        pytest.approx(max(rewards), rel=1e-5),
    ]
    assert table.totals["seconds"] == pytest.approx(sum(row_of(s, 1000)["seconds"] for s in range(1, 1001)))
    assert table.steps == 1000


def test_changes_replace_rows() -> None:
    """Whoever applies the changes, at whatever times, has the table."""
    table, here, columns, at = StepTable(), dict[int, list[object]](), list[str](), None
    for step in range(1, 900):
        table.add_step(row_of(step, 900))
        table.add_log(logs_of(row_of(step, 900))[0])
        if step % 7 == 0 or step == 899:
            at, changes = table.changes(at)
            assert changes is not None
            if changes["anew"]:
                here.clear()
            here.update({row[0]: row[1:] for row in changes["rows"]})
            columns = changes["columns"]
    whole = table.changes()[1]
    assert columns == whole["columns"]
    assert list(here.items()) == [(row[0], row[1:]) for row in whole["rows"]]
    assert table.changes(at)[1] is None


def test_speed_of_training_counts_the_tokens_of_a_generation_batch_once() -> None:
    table = StepTable()
    tokens = (1000, 1000, 3000, 3000, 5000)
    for step, (total, seconds) in enumerate(zip(tokens, (2.0, 3.0, 2.0, 3.0, 2.0), strict=True), 1):
        table.add_step({"step": step, "completion_tokens": total, "seconds": seconds, "wait_seconds": 1.0})
    changes = table.changes()[1]
    column = changes["columns"].index("trained_tokens_per_second") + 1
    assert [row[column] if len(row) > column else None for row in changes["rows"]] == [500.0, None, 400.0, None, 400.0]


def test_a_speed_of_passes_counts_what_its_step_report_counts() -> None:
    table = StepTable()
    table.add_step({"step": 1, "completion_tokens": 100, "seconds": 2.0, "train_tokens_per_second": 700.0})
    columns = table.changes()[1]["columns"]
    assert table.last["train_tokens_per_second"] == 700.0
    shown = {key for chart in CHARTS for key, *_ in chart["series"] if key.endswith("tokens_per_second")}
    assert {name for name in columns if name.endswith("tokens_per_second")} <= shown


def test_many_reward_functions_have_a_bound() -> None:
    table = StepTable()
    table.add_log({"step": 1, **{f"rewards/f{i}/mean": 1.0 for i in range(100)}, "custom/metric": 3.0})
    assert len(table.changes()[1]["columns"]) == 12


def test_a_step_that_is_far_away() -> None:
    table = StepTable()
    table.add_step({"step": 3, "reward": 0.5})
    table.add_step({"step": 1 << 39, "reward": 1.0})
    assert len(table.changes()[1]["rows"]) == 2


def test_json_in_a_page_and_in_a_line() -> None:
    text = html_json({"</script>": ["\u2028", "\n", "\ud800", "<!--", "é"]})
    assert not set(text) & set("<>\u2028\n\ud800")
    assert json.loads(text) == {"</script>": ["\u2028", "\n", "\ud800", "<!--", "é"]}
    assert batch_of(1)["step"] == 1
    assert "Lockstep" in render({"r": RunView("r")})


def test_drift_of_another_program() -> None:
    table = StepTable()
    table.add_step({"step": 1, "drift": 0.2, "reward": 0.5})
    assert table.last["reward"] == 0.5
