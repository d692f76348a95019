"""The examples of agents, trained for two steps against a real server, as `learner train` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.commands import train
from learner.servers.client import RolloutClient
from tests.integration.support.forked import REPOSITORY
from tests.integration.support.learner_process import COMMON
from tests.integration.support.server import ServerProcess
from tests.support.arguments import arguments

EXAMPLES = {
    "calculator": {"--agent": "examples.agents.calculator:agent"},
    "reviewer": {"--agent": "examples.agents.reviewer:agent", "--packed_passes": "false"},
    "program": {"--agent_command": "sh examples/agents/ask.sh"},
    "ahead": {"--agent": "examples.agents.calculator:agent", "--max_staleness": 1, "--top_k": 20},
}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "sums.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i + 2} ="}], "answer": str(2 * i + 2)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("example", EXAMPLES)
def test_trains(
    server: ServerProcess,
    client: RolloutClient,
    model: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: str,
) -> None:
    monkeypatch.chdir(REPOSITORY)  # where the examples are found
    out = tmp_path / example
    options: dict[str, Any] = {
        "--rollout_url": server.url,
        "--model_name_or_path": model,
        "--task": sums,
        "--output_dir": out,
        "--max_steps": 2,
        "--save_strategy": "no",
        "--proof_canary": "false",
    }
    summary = train.run(*train.parse([*COMMON, *arguments({**options, **EXAMPLES[example]})]))
    assert summary["steps"] == summary["pushes"] == 2
    assert summary["completions"] == 16
    assert summary["agent_episodes"] >= 16
    assert summary["agent_left_out"] == 0
    step_behind = 0.1 if summary["lags"].get("1") else 0.0  # what was read ahead is of the step before
    assert summary["max_drift_kl"] < 1e-4 + step_behind, "what is trained on is what was sampled"
    assert summary["unscored_tokens"] == 0
    client.delete_run(summary["run_id"], json.loads((out / "lease.json").read_text())["secret"])
