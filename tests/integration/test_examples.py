"""Every example runs as it is, with the tiny model. The notebook, which shares its GPU, is in test_share_gpu.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import learner.commands.train
from learner.run_dir.files import HISTORY_FILE, read_lines
from learner.servers.client import RolloutClient
from tests.integration.support.examples import EXAMPLES, run_example
from tests.integration.support.forked import FORKING
from tests.integration.support.lm_tasks import CHOICE, write_tasks
from tests.integration.support.server import ServerProcess
from tests.support.arguments import arguments


@pytest.mark.parametrize("name", ["trl_script.py", "unsloth_migration.py"])
def test_scripts(server: ServerProcess, model: Path, tmp_path: Path, name: str) -> None:
    run_example(
        [sys.executable, str(EXAMPLES / name)],
        tmp_path,
        MODEL=model,
        ROLLOUT_URL=server.url,
        OUTPUT_DIR=tmp_path / "run",
        MAX_COMPLETION_LENGTH=16,
    )
    history = read_lines(tmp_path / "run" / HISTORY_FILE)
    assert [row["step"] for row in history] == [1, 2]
    assert list((tmp_path / "run").rglob("adapter_model.safetensors"))
    with RolloutClient(server.url) as client:
        lease = json.loads((tmp_path / "run" / "lease.json").read_text())
        served = next(run.version for run in client.state().runs if run.run_id == lease["run_id"])
    assert served.step == 2


def test_own_reward(server: ServerProcess, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions are shown at work, and train by the flags that the file names."""
    assert " 1.0  The answer is 42." in run_example([sys.executable, str(EXAMPLES / "own_reward.py")], tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}:{FORKING}")
    text = (EXAMPLES / "own_reward.py").read_text()
    named = text.partition("learner train ")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    assert "examples/questions.jsonl" in named
    flags = arguments(
        {
            "--rollout_url": server.url,
            "--model_name_or_path": model,
            "--output_dir": tmp_path / "run",
            "--max_steps": 1,
            "--max_completion_length": 16,
            "--dtype": "float32",
            "--lora_r": 4,
            "--use_cpu": "true",
            "--bf16": "false",
            "--reward_workers": 1,
            "--proof_canary": "false",
        }
    )
    summary = learner.commands.train.run(*learner.commands.train.parse([*named, *flags]))
    assert summary["steps"] == 1
    (row,) = read_lines(tmp_path / "run" / "logs.jsonl")[:1]
    assert {"rewards/right/mean", "rewards/short/mean"} <= row.keys()


def test_eval_with_lm_eval(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    shown = run_example(
        [str(EXAMPLES / "eval_with_lm_eval.sh"), "--include_path", str(write_tasks(tmp_path))],
        tmp_path,
        MODEL=model,
        ROLLOUT_URL=server.url,
        SERVED="base",
        TASKS=CHOICE,
        LIMIT=2,
    )
    assert "== base" in shown
    assert CHOICE in shown.partition("== base")[2]
