"""The demo is `learner up` with a model and a recipe; afterwards it sums up what the run's files say."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from learner.commands import training, up
from learner.demo import __main__ as demo


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[up.Plan]:
    """What would have been started; the run leaves the files of a training with evaluations."""
    started: list[up.Plan] = []

    def run(plan: up.Plan, environment: dict[str, str]) -> int:
        started.append(plan)
        plan.output_dir.mkdir(parents=True, exist_ok=True)
        scores = [{"step": 0, "eval_reward": 0.25}, {"step": 1, "reward": 0.5}, {"step": 32, "eval_reward": 0.75}]
        # The first two were before this call.
        evals = [{**row, "time": time.time() + 100.0 * (step - 1.5)} for step, row in enumerate(scores)]
        (plan.output_dir / "logs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
        (plan.output_dir / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
        (plan.output_dir / "train.json").write_text('{"steps": 32, "train_seconds": 9.0}')
        return 3 if "--fails" in plan.learner else 0

    monkeypatch.setattr(up, "run", run)
    monkeypatch.setattr(training, "check", lambda argv: None)  # of a model that only pretends, too
    monkeypatch.setattr(demo, "ensure_demo_model", lambda *_, dtype, **__: tmp_path / f"model-{dtype}")
    return started


def test_the_recipe_is_trained_and_summed_up(plans: list[up.Plan], tmp_path: Path) -> None:
    flags = ["--seed", "7", "--split-cores", "--server-flags", "--seed 3", "--train-flags", "--max_steps 4"]
    assert demo.main(["--output-dir", str(tmp_path / "out"), *flags]) == 0
    (plan,) = plans
    assert plan.server[4] == str(tmp_path / "model-float32")
    assert plan.server[-2:] == ["--seed", "3"]
    assert "--enforce-eager" in plan.server
    assert plan.server_cores is not None
    at = plan.learner.index("--seed")
    assert plan.learner[at : at + 4] == ["--seed", "7", "--max_steps", "4"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["eval_before"], summary["eval_after"], summary["eval_questions"]) == (0.25, 0.75, 40)
    assert summary["train_seconds"] == 9.0
    assert 0.0 < summary["seconds"] < 50.0 <= summary["seconds_to_first_reward"], "its time is made up"
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000


def test_a_training_that_fails_is_not_summed_up(plans: list[up.Plan], tmp_path: Path) -> None:
    assert demo.main(["--output-dir", str(tmp_path), "--train-flags", "--fails"]) == 3
    assert plans
    assert not (tmp_path / "summary.json").exists()
