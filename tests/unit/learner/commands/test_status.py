"""`learner status`: reachable and unreachable servers, and run directories with and without a training."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import learner.commands.status
from learner.cli import main
from learner.servers.client import RolloutClient
from shared.weights import BaseFingerprint, RunState, ServerState, WeightVersion
from tests.support.made_up_run import RunWriter

STATE = ServerState(
    epoch="e1",
    ready=True,
    model="tiny",
    base=BaseFingerprint(weights=None, tokenizer=None, chat_template=None),
    vllm_version="0.32.0",
    device="cpu",
    dtype="float32",
    lora_dtype="float32",
    max_model_len=128,
    max_lora_rank=16,
    slots_per_run=2,
    max_runs=2,
    workers=1,
    logprobs_mode="processed_logprobs",
)


def _run(step: int) -> RunState:
    version = WeightVersion(run_id="r", fence=1, step=step)
    return RunState(run_id="r", version=version, checksum="c", install_seq=1, slots=[], running_requests=3)


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """State of each server by host; others cannot be reached."""
    states: dict[str, Any] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        state = states.get(request.url.host)
        if state is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, content=state.model_dump_json())

    def connect(url: str, token: str | None = None, ca_file: str | None = None) -> RolloutClient:
        return RolloutClient(url, token, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(learner.commands.status, "RolloutClient", connect)
    return states


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Directory of a run at step 7 of 10."""
    same = {
        "max_steps": 10,
        "lag": 1.0,
        "seconds": 2.0,
        "wait_seconds": 0.5,
        "push_seconds": 0.25,
        "rollout_tokens_per_second": 1234.5,
        "logprob_gap": None,
        "reward_std": math.nan,
    }
    lines = "".join(json.dumps({"step": i, "reward": i / 10, **same}) + "\n" for i in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 8, "rew')  # being written
    (tmp_path / "logs.jsonl").write_text('{"step": 5, "loss": 0.1}\n{"step": 5, "eval_reward": 0.625}\n')
    (tmp_path / "lease.json").write_text('{"run_id": "r", "secret": "s", "fence": 1}')
    return tmp_path


def _json(capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, dict[str, Any]]:
    status = main(["status", "--json", *flags])
    return status, json.loads(capsys.readouterr().out)


def test_servers_of_a_file_and_the_run(served, run_dir, tmp_path, capsys):
    served |= {
        "a": STATE.model_copy(update={"runs": [_run(7)]}),
        "b": STATE.model_copy(update={"runs": [_run(5)]}),
        "c": STATE.model_copy(update={"draining": True}),
    }
    places = tmp_path / "servers.txt"
    places.write_text("http://a:1\nhttp://b:1\nhttp://c:1\nhttp://d:1\n")
    status, found = _json(capsys, "--rollout-url", f"file:{places}", "--run-dir", str(run_dir))
    assert status == 0
    assert [server["state"] for server in found["servers"]] == ["ready", "ready", "draining", "away"]
    assert [run["lag"] for server in found["servers"] for run in server["runs"]] == [0, 2]
    assert "refused" in found["servers"][3]["error"]
    run = found["run"]
    assert (run["run_id"], run["step"], run["max_steps"], run["finished"]) == ("r", 7, 10, False)
    assert run["last"]["push_seconds"] == 0.25
    assert run["last"]["reward_std"] is None
    assert run["rewards"][-1] == 0.7
    assert (run["eval_reward"], run["eval_step"]) == (0.625, 5)

    assert main(["status", "--rollout-url", f"file:{places}", "--run-dir", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "r  step 7/10  last step 0 s ago" in shown
    assert "▁▂▃▅▆▇█  0.100 → 0.700" in shown
    assert "eval    0.625 at step 5" in shown
    assert "tok/s 1,234" in shown
    assert "gap" not in shown
    lines = shown.splitlines()
    assert [line.split()[2:] for line in lines if line.startswith(("http://a", "http://b"))] == [
        ["r", "1.7", "0", "3", "-", "not", "finished"],
        ["r", "1.5", "2", "3", "-", "not", "finished"],
    ]


def test_a_learner_that_is_ahead_of_its_server(served, run_dir, capsys):
    served["a"] = STATE.model_copy(update={"runs": [_run(6)]})
    _, found = _json(capsys, "--rollout-url", "http://a:1", "--run-dir", str(run_dir))
    assert found["servers"][0]["runs"][0]["lag"] == 1


def test_after_the_training(run_dir, capsys):
    (run_dir / "train.json").write_text("{}")
    status, found = _json(capsys, "--run-dir", str(run_dir))
    assert status == 0
    assert found["run"]["finished"]
    assert found["servers"] == []
    later = time.time() + 5
    os.utime(run_dir / "metrics.jsonl", (later, later))  # it was started again
    assert not _json(capsys, "--run-dir", str(run_dir))[1]["run"]["finished"]


def test_a_training_that_has_failed_says_why(run_dir, capsys):
    (run_dir / "run.json").write_text(json.dumps({"error": "the reward 'r' raised"}))
    assert _json(capsys, "--run-dir", str(run_dir))[1]["run"]["error"] == "the reward 'r' raised"
    assert main(["status", "--run-dir", str(run_dir)]) == 0
    assert "failed  the reward 'r' raised" in capsys.readouterr().out
    with (run_dir / "metrics.jsonl").open("a") as rows:  # it goes on, without a page
        rows.write(json.dumps({"step": 8, "max_steps": 10}) + "\n")
    os.utime(run_dir / "run.json", (0, 0))
    assert _json(capsys, "--run-dir", str(run_dir))[1]["run"]["error"] is None


def test_a_training_that_failed_before_its_first_step_says_why(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"error": "the reward 'r' raised"}))
    assert main(["status", "--run-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path}: no step has ended; failed: the reward 'r' raised")


def test_nothing_is_known(tmp_path, capsys):
    assert main(["status"]) == 2
    assert "--rollout-url, --run-dir" in capsys.readouterr().err
    assert main(["status", "--run-dir", str(tmp_path / "none")]) == 2
    assert "output_dir" in capsys.readouterr().err
    assert main(["status", "--run-dir", str(tmp_path)]) == 1
    assert "no step has ended" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.3}\n{"step": "2", "max_steps": 3}\n')  # another's
    assert main(["status", "--run-dir", str(tmp_path)]) == 1
    assert "no step has ended" in capsys.readouterr().out
    assert main(["status", "--rollout-url", "http://a:1"]) == 1
    assert "away" in capsys.readouterr().out


def test_what_is_damaged_is_left_out(run_dir, capsys):
    (run_dir / "lease.json").write_text("[]")
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 9, "max_steps": 10, "lag": "none"}\n')
    assert main(["status", "--run-dir", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "step 9/10" in shown
    assert "lag" not in shown


@pytest.mark.parametrize("command", ["status", "runs"])
def test_a_source_that_names_no_server_is_a_failure(tmp_path, capsys, command):
    (tmp_path / "servers.txt").write_text("# none yet\n")
    source = f"file:{tmp_path}/servers.txt"
    assert main([command, "--rollout-url", source]) == 1
    assert capsys.readouterr().out == f"{source}: no server is there now\n"
    assert main([command, "--rollout-url", source, "--json"]) == 1


def test_watching_shows_it_again(served, monkeypatch, capsys):
    served["a"] = STATE
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        served["a"] = STATE.model_copy(update={"runs": [_run(len(pauses))]})
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner.commands.status.time, "sleep", pause)
    assert main(["status", "--rollout-url", "http://a:1", "--watch", "0.5"]) == 130
    shown = capsys.readouterr().out
    assert pauses == [0.5] * 3
    assert "1.1" in shown
    assert "1.2" in shown
    assert "\x1b" not in shown


def test_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    def wait() -> None:
        raise Ended

    endless = SimpleNamespace(Event=lambda: SimpleNamespace(wait=wait))
    monkeypatch.setattr(learner.commands.status, "threading", endless)
    RunWriter(tmp_path / "a run").go_on(2)
    with pytest.raises(Ended):
        main(["status", "--serve", str(tmp_path), "--page-port", "0"])
    runs, _, url = capsys.readouterr().out.split("  ")[0].partition(": ")
    assert runs == "a run"
    assert "Lockstep" in httpx.get(url).text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--serve", "NOWHERE"], "--serve NOWHERE is not a directory; give a run's output_dir, or a folder of such"),
        (["--serve", ".", "--json"], "--serve shows runs in a browser: leave"),
        (["--serve", ".", "--page-port", "70000"], "--page-port: 70000 is out of range"),
        (["--serve", ".", "--page-host", "192.0.2.1"], "--page-port 8700: cannot listen on 192.0.2.1:8700"),
    ],
)
def test_what_cannot_be_served(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
