"""`learner eval` of several policies, stored ones among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

import learner.commands.eval
from learner.cli import main
from learner.servers.client import RolloutClient
from learner.tasks import Task
from tests.unit.learner.adapters.test_exporter import peft_model

TASK = f"{__name__}:task"


def task(**_):
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}"} for i in range(12)])
    return Task(name="toy", train=rows.select(range(4)), eval=rows.select(range(4, 12)), reward_funcs=[odd])


def odd(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]


@pytest.fixture
def connected(server, monkeypatch):
    def connect(url, token=None, **kwargs):
        return RolloutClient(url, token, transport=server.transport, **kwargs)

    monkeypatch.setattr(learner.commands.eval, "RolloutClient", connect)
    return server


def test_a_limit_above_what_is_held_out_is_said(connected, capsys) -> None:
    flags = ["--rollout-url", "http://fake", "--task", TASK, "--max-tokens", "4", "--policy", "base"]
    assert main(["eval", *flags, "--limit", "200"]) == 0
    assert "--limit 200: 8 are there (--eval-size, as in training," in capsys.readouterr().err
    assert main(["eval", *flags, "--limit", "8"]) == 0
    assert "--limit" not in capsys.readouterr().err


def test_policies_side_by_side(connected, model_dir: Path, tmp_path: Path, capsys) -> None:
    peft_model(model_dir).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "eval.json"
    flags = ["--rollout-url", "http://fake", "--task", TASK, "--max-tokens", "4", "--json", str(out)]
    assert main(["eval", *flags, "--policy", "base", str(tmp_path / "adapter")]) == 0
    document = json.loads(out.read_text())
    assert [r["policy"] for r in document["results"]] == ["base", str(tmp_path / "adapter")]
    assert document["results"][0]["low"] <= document["results"][0]["reward"] <= document["results"][0]["high"]
    assert document["results"][1]["versions"][0].startswith("eval-")
    assert document["differences"][0]["against"] == "base"
    assert "8 questions" in capsys.readouterr().out
    assert connected.pushed, "the temporary run is gone"
    assert not connected.served, "the temporary run is gone"
    assert main(["eval", *flags, "--policy", str(tmp_path / "nothing")]) == 2
