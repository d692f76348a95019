"""`learner up` with its real processes: both begin, train and end, and the run can be gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.support.forked import FORKING, REPOSITORY, ForkedProcess
from tests.integration.support.learner_process import COMMON, write_questions
from tests.integration.support.server import ENVIRONMENT, ServerProcess
from tests.integration.support.waiting import until
from tests.support.arguments import arguments


@pytest.mark.timeout(1200)
def test_one_command_trains_and_the_run_can_be_gone_on_with(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    options = {name.removeprefix("--"): value for name, value in zip(COMMON[::2], COMMON[1::2], strict=True)}
    own = {
        "model_name_or_path": str(model),
        "task": str(write_questions(tmp_path / "questions.jsonl")),
        "output_dir": str(out),
        "max_steps": 2,
        "save_steps": 2,
        "env": {"PYTHONPATH": FORKING},
        "server": {"max-model-len": 256, "max-num-seqs": 16, "enforce-eager": True, "num-gpu-blocks-override": 256},
    }
    recipe.write_text(yaml.safe_dump({**options, **own}))
    environment = {**os.environ, **ENVIRONMENT}
    with (tmp_path / "up.log").open("wb") as output:
        up = subprocess.Popen(
            [sys.executable, "-m", "learner.cli", "up", "--config", recipe],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    log, started = tmp_path / "up.log", []
    try:
        until(lambda: "the rollout server is ready" in log.read_text() or up.poll() is not None, 600.0)
        if up.poll() is None:
            started = psutil.Process(up.pid).children(recursive=True)
        assert up.wait(300) == 0, log.read_text()[-4000:]
    finally:
        up.terminate()
        up.wait()
    assert len(started) >= 4, "the server, its engine and worker, the learner"
    assert psutil.wait_procs(started, timeout=30.0)[1] == []
    assert json.loads((out / "train.json").read_text())["pushes"] == 2

    again = {"--config": recipe, "--rollout_url": server.url, "--max_steps": 3}
    resumed = ForkedProcess("learner.cli", ["train", *arguments(again)], tmp_path / "again.log", environment)
    assert resumed.wait(180) == 0, (tmp_path / "again.log").read_text()[-4000:]
    summary = json.loads((out / "train.json").read_text())
    assert (summary["steps"], summary["pushes"]) == (3, 3)
