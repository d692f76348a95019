"""`learner runs`: what is listed, whose lease ends a run, and what is said where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import learner.commands.runs
from learner.cli import main
from learner.run_dir.lease import Lease, save_lease
from learner.servers.client import RolloutClient
from shared.errors import LeaseMismatch, LockstepError, UnknownRun
from shared.weights import RunState, WeightVersion
from tests.unit.learner.commands.test_status import STATE

SECRET = "the secret of a learner"  # pragma: allowlist secret


def _run(run_id: str, **fields: Any) -> RunState:
    version = WeightVersion(run_id=run_id, fence=1, step=7)
    seen = {"checksum": "c", "install_seq": 1, "slots": [], "running_requests": 0, "seconds_since_push": 200.0}
    return RunState(run_id=run_id, version=version, **{**seen, **fields})


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, RunState]]:
    """Runs of each server by host; all of one learner. Others cannot be reached."""
    servers: dict[str, dict[str, RunState]] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        runs = servers.get(request.url.host)
        if runs is None:
            raise httpx.ConnectError("refused", request=request)
        try:
            if request.method == "DELETE":
                _delete(runs, request)
                return httpx.Response(200, json=None)
        except LockstepError as error:
            return httpx.Response(error.status, json=error.body().model_dump())
        return httpx.Response(200, content=STATE.model_copy(update={"runs": list(runs.values())}).model_dump_json())

    def connect(url: str, token: str | None = None, ca_file: str | None = None) -> RolloutClient:
        return RolloutClient(url, token, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(learner.commands.runs, "RolloutClient", connect)
    return servers


def _delete(runs: dict[str, RunState], request: httpx.Request) -> None:
    run_id, headers = request.url.path.split("/")[3], request.headers
    if run_id not in runs:
        raise UnknownRun("no such run")
    allowed = headers["Lockstep-Lease"] == SECRET or "Lockstep-Takeover" in headers
    if not (allowed or (runs[run_id].finished and not runs[run_id].kept_seconds)):
        raise LeaseMismatch("another learner's")
    del runs[run_id]


def _call(*flags: str) -> int:
    return main(["runs", "--rollout-url", "http://a:1", "http://b:1", *flags])


def test_runs_are_listed(served, capsys):
    served["a"] = {
        "one": _run("one"),
        "two": _run("two", finished=True, kept_seconds=0.0),
        "three": _run("three", finished=True, kept_seconds=90.0),
    }
    assert _call() == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines[1:4]] == ["one", "two", "three"]
    assert [line[4].split("ago  ")[1] for line in lines[1:4]] == [
        "not finished",
        "finished",
        "finished, kept 90 s more",
    ]
    assert "refused" in " ".join(lines[4])
    assert _call("--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["runs"][1]["finished"]
    del served["a"]
    assert _call() == 1


def test_a_finished_run_is_ended_by_its_name(served, capsys):
    served["a"] = {"r": _run("r", finished=True), "s": _run("s")}
    served["b"] = {"r": _run("r", finished=True)}
    assert _call("--end", "r") == 0
    assert list(served["a"]) == ["s"]
    assert not served["b"]
    assert "run r: ended on 2 of 2 servers" in capsys.readouterr().out
    assert _call("--end", "r") == 1
    assert "run r: no server has it" in capsys.readouterr().out


def test_another_learners_run_needs_its_directory_or_a_takeover(served, tmp_path: Path, capsys):
    served["a"] = served["b"] = {"r": _run("r"), "kept": _run("kept", finished=True, kept_seconds=9.0)}
    for run_id in ("r", "kept"):
        assert _call("--end", run_id) == 1
        error = capsys.readouterr().err
        assert f"run {run_id} on http://a:1 has not finished" in error
        assert "--run-dir" in error
        assert "--takeover" in error
    assert len(served["a"]) == 2
    save_lease(tmp_path, Lease("r", SECRET, 3))
    assert _call("--end", "--run-dir", str(tmp_path)) == 0
    assert list(served["a"]) == ["kept"]
    assert _call("--end", "kept", "--run_dir", str(tmp_path)) == 2
    assert "is of run r" in capsys.readouterr().err
    assert _call("--end", "kept", "--takeover") == 0
    assert not served["a"]


def test_what_is_left_out_is_asked_for(served, tmp_path: Path, capsys):
    served["a"] = {"r": _run("r")}
    assert _call("--end") == 2
    assert "--run-dir" in capsys.readouterr().err
    assert _call("--end", "--run-dir", str(tmp_path)) == 2
    assert "no lease.json" in capsys.readouterr().err
    for damage in ("[]", '{"run_id": "r", "secret": "s", "fence": "3"}', '{"run_id": 5, "secret": "s", "fence": 3}'):
        (tmp_path / "lease.json").write_text(damage)
        assert _call("--end", "--run-dir", str(tmp_path)) == 2
        assert "lease.json is damaged" in capsys.readouterr().err
    assert list(served["a"]) == ["r"]
