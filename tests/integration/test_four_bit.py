"""QLoRA: the learner holds the base in four bits, the server in float32, and both sample from one policy."""

from __future__ import annotations

import json
from pathlib import Path

from learner.commands.four_bit_base import make_base
from tests.integration.conftest import FLAGS
from tests.integration.support.learner_process import LearnerProcess, write_questions
from tests.integration.support.server import running_server


def test_a_learner_in_four_bits_trains_the_policy_that_is_served(model: Path, tmp_path: Path) -> None:
    base, task = tmp_path / "base", write_questions(tmp_path / "questions.jsonl")
    make_base(str(model), base, dtype="float32")
    flags = ["--load_in_4bit", "true", "--max_steps", "3", "--save_strategy", "no", "--save_merged", "true"]
    with running_server(base, tmp_path, *FLAGS) as server:
        careless = LearnerProcess(server.url, model, task, tmp_path / "careless", *flags)
        learner = LearnerProcess(server.url, base, task, tmp_path / "run", *flags)
        assert careless.process.wait(120) != 0
        assert "four-bit-base" in careless.tail()
        summary = learner.finish()
    assert summary["steps"] == 3
    assert abs(summary["canary_slope"] - 1) < 0.05
    assert 0 < summary["max_logprob_gap"] < summary["logprob_tolerance"]
    assert "lockstep_four_bit" not in json.loads((tmp_path / "run" / "merged" / "config.json").read_text())
