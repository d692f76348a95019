"""`deploy/slurm/ray.sbatch` over stand-ins of SLURM's commands, of Ray and of `learner`."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.deploy.files import ROOT

SCRIPT = ROOT / "deploy" / "slurm" / "ray.sbatch"
#: Each writes what it was called with.
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; fi',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "squeue": "echo RUNNING",
    "hostname": "echo 10.0.0.1 10.1.0.1",
    "ray": 'cp "$RAY_AUTH_TOKEN_PATH" "$CALLS.token"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$CALLS.mode"; exec sleep 600',
    "learner": 'trap "exit 130" TERM; if [ "$2" = fail ]; then exit 2; fi; if [ "$2" = done ]; then exit 0; fi; '
    'touch "$CALLS.runs"; while true; do sleep 0.05; done',
}
RAY = "nodes = lambda: [{'Alive': True}, {'Alive': True}]\ndef init(*args, **kwargs): print('asks', *args)\n"


@pytest.fixture
def sbatch(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, body in COMMANDS.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)
    (folder / "python3").symlink_to(sys.executable)
    (tmp_path / "ray.py").write_text(RAY)

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "PYTHONPATH": str(tmp_path),
            "CALLS": str(calls),
            "LOCKSTEP_VENV": str(tmp_path / "none"),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_ON_NODE": "8",
        }
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def test_a_training_that_ends_ends_the_job(sbatch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = sbatch("done", "--servers", "3")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    calls = (tmp_path / "calls").read_text()
    assert "learner up done --servers 3 --cluster 10.0.0.1:24242\n" in calls
    assert "srun --overlap --nodes=1 --ntasks=1 --nodelist=node-a ray start --head" in calls
    assert "srun --overlap --nodes=1 --ntasks=1 --nodelist=node-b ray start --address=10.0.0.1:24242" in calls
    assert "scontrol requeue" not in calls
    assert "asks 10.0.0.1:24242" in output


def test_rays_token_is_in_a_file_of_the_users_own_and_gone_at_the_end(
    sbatch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output, _ = sbatch("done").communicate(timeout=300)
    token = (tmp_path / "calls.token").read_text()
    assert len(token) == 64
    assert (tmp_path / "calls.mode").read_text() == "600\n"
    assert token not in (tmp_path / "calls").read_text() + output
    assert not list(tmp_path.glob(".lockstep-slurm-*"))


def test_a_training_that_fails_fails_the_job(sbatch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = sbatch("fail")
    process.communicate(timeout=300)
    assert process.returncode == 2
    assert "scontrol requeue" not in (tmp_path / "calls").read_text()


def test_a_job_whose_time_is_up_saves_and_is_queued_again(
    sbatch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = sbatch("long")
    while not (tmp_path / "calls.runs").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "scontrol requeue 4242\n" in (tmp_path / "calls").read_text()
    assert "goes on from its last checkpoint" in output


def test_a_job_that_is_canceled_is_not_queued_again(
    sbatch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho COMPLETING\n")
    process = sbatch("long")
    while not (tmp_path / "calls.runs").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130
    assert "scontrol requeue" not in (tmp_path / "calls").read_text()


def test_it_is_a_script_that_can_be_run() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
