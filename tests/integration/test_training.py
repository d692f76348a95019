"""Whole trainings as a user starts them: killed and resumed to the same bytes, and with rollouts that run ahead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.client import RolloutClient
from shared.errors import LockstepError
from shared.weights import WeightVersion
from tests.integration import policy as P
from tests.integration.conftest import FLAGS
from tests.integration.learner_process import LearnerProcess, write_questions
from tests.integration.server import ServerProcess, running_server

DETERMINISTIC = [
    "--deterministic", "true", "--max_steps", "9", "--save_steps", "2", "--steps_per_generation", "3",
    "--lora_dropout", "0.1", "--proof_canary", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("task") / "questions.jsonl")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A deterministic server, for several runs one after the other."""
    with running_server(
        model, tmp_path_factory.mktemp("server"), *FLAGS, "--deterministic", "--max-runs", "8"
    ) as process:
        yield process


def test_killed_and_resumed_to_the_same_bytes(server: ServerProcess, model: Path, task: Path, tmp_path: Path) -> None:
    """Killed inside generation batches; the server is ahead of the checkpoint, and then, started anew, behind it."""
    whole = LearnerProcess(server.url, model, task, tmp_path / "whole", *DETERMINISTIC)
    summary = whole.finish()
    assert summary["steps"] == summary["pushes"] == 9

    cut = [server.url, model, task, tmp_path / "cut", *DETERMINISTIC]
    LearnerProcess(*cut).kill_after(3)
    LearnerProcess(*cut).kill_after(5)
    with running_server(model, tmp_path, *FLAGS, "--deterministic") as another:
        resumed = LearnerProcess(another.url, *cut[1:])
        again = resumed.finish()
    assert resumed.adapter_digest() == whole.adapter_digest()
    assert {name: again[name] for name in ("steps", "pushes", "completions", "completion_tokens")} == {
        name: summary[name] for name in ("steps", "pushes", "completions", "completion_tokens")
    }
    lease = json.loads((tmp_path / "cut" / "lease.json").read_text())
    assert lease["fence"] == 2


def test_rollouts_run_ahead_within_the_bound(server: ServerProcess, model: Path, task: Path, tmp_path: Path) -> None:
    flags = ["--max_staleness", "1", "--max_steps", "6", "--save_strategy", "no"]
    learner = LearnerProcess(server.url, model, task, tmp_path / "ahead", *flags)
    summary = learner.finish()
    # A request that meets a proof on its way may be admitted after the next push already.
    assert set(summary["lags"]) == {"0", "1"} and summary["lags"]["1"] >= 24 and summary["regenerated"] == 0
    assert sum(summary["lags"].values()) == summary["completions"] == 48
    assert summary["max_logprob_gap"] < 1e-4
    history = [json.loads(line) for line in (tmp_path / "ahead" / "metrics.jsonl").read_text().splitlines()]
    assert history[0]["lag"] == 0 and max(step["lag"] for step in history) == 1
    assert all(step["idle_seconds"] is not None for step in history)


def test_killed_and_resumed_with_rollouts_ahead(server: ServerProcess, model: Path, task: Path, tmp_path: Path) -> None:
    """What was being read ahead is asked for again; nothing is counted twice, and nothing too old is trained on."""
    flags = ["--max_staleness", "1", "--max_steps", "7", "--save_steps", "2", "--proof_canary", "false"]
    command = (server.url, model, task, tmp_path / "again", *flags)
    LearnerProcess(*command).kill_after(3)
    summary = LearnerProcess(*command).finish()
    assert summary["steps"] == summary["pushes"] == 7 and summary["completions"] == 7 * 8
    assert set(summary["lags"]) <= {"0", "1"} and summary["regenerated"] == 0


def test_a_push_does_not_overtake_on_a_deterministic_server(server: ServerProcess, model: Path) -> None:
    with RolloutClient(server.url) as client:
        policy = P.make_policy(model)
        P.push(client, policy, "drained", 0)
        blob = P.blob(policy, WeightVersion(run_id="drained", step=1), client.state().base.weights)
        with pytest.raises(LockstepError, match="use drain"):
            client.push("drained", [blob], P.LEASE, in_flight="keep")
