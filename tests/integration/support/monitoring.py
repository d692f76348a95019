"""Monitoring of a training: metrics of both sides, `learner status`, the run's page."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time

import httpx

from tests.integration.support.learner_process import LearnerProcess
from tests.integration.support.server import HTTP, ServerProcess
from tests.support.arguments import arguments


def monitor(server: ServerProcess, learner: LearnerProcess, port: int, token: str, token_file: str) -> str:
    """Return the last metrics of both sides during a training of six steps; check status and page at its end."""
    metrics = ["", ""]
    headers = {"Authorization": f"Bearer {token}"}
    while learner.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            metrics = [
                HTTP.get(f"{url}/metrics/", headers=headers).text for url in (server.url, f"http://127.0.0.1:{port}")
            ]
        time.sleep(0.2)
    assert learner.process.returncode == 0, learner.tail()
    steps = re.search(r"^lockstep_learner_step ([0-9.]+)$", metrics[1], re.MULTILINE)
    assert steps, metrics[1]
    assert float(steps[1]) >= 1, metrics[1]
    command = [
        sys.executable,
        "-m",
        "learner.cli",
        "status",
        *arguments(
            {"--json": None, "--rollout-url": server.url, "--run-dir": learner.folder, "--token-file": token_file}
        ),
    ]
    status = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert status["run"]["finished"]
    assert status["run"]["step"] == 6
    assert len(status["run"]["rewards"]) == 6
    run = next(run for run in status["servers"][0]["runs"] if run["run_id"] == status["run"]["run_id"])
    assert run["step"] == 6
    assert run["lag"] == 0
    assert '"finished"' in (learner.folder / "run.html").read_text()
    return "\n".join(metrics)
