"""Jobs that make a Ray cluster and run `learner up` on it: SkyPilot's over stand-ins, KubeRay's as it is written."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from learner.commands.up import read
from learner.commands.up_recipe import Recipe
from tests.unit.deploy.files import ROOT, manifests

SKYPILOT = yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text())
#: Each writes what it was called with.
COMMANDS = {
    "ray": 'stat -c %a "$RAY_AUTH_TOKEN_PATH" >>"$CALLS.mode"; cat "$RAY_AUTH_TOKEN_PATH" >"$CALLS.token"\n'
    'case "$2" in --head) exec sleep 600;; esac\n'
    # A node that finds its head at the second attempt, and loses it then.
    'if [ -e "$CALLS.tried" ]; then echo "Ray runtime started."; fi; touch "$CALLS.tried"; exit 1',
    "learner": 'exit "${STATUS:-0}"',
    "sleep": '[ "$1" = 600 ] && exec /bin/sleep 600 || true',
}
RAY = "nodes = lambda: [{'Alive': True}, {'Alive': True}]\ndef init(*args, **kwargs): print('asks', *args)\n"
TOKEN = "a-token-of-the-user-s-own"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    folder = tmp_path / "lockstep" / "bin"
    folder.mkdir(parents=True)
    for name, body in COMMANDS.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    (tmp_path / "ray.py").write_text(RAY)
    (tmp_path / "tmp").mkdir()

    def start(rank: int, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {name: str(value) for name, value in SKYPILOT["envs"].items()}
        given |= {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path / "tmp"),
            "PYTHONPATH": str(tmp_path),
            "CALLS": str(tmp_path / "calls"),
            "RAY_ADDRESS": "SkyPilot's own",
            "RAY_TOKEN": TOKEN,
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        }
        return subprocess.run(
            ["bash", "-c", SKYPILOT["run"]],
            env=given | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def recipe_of(command: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Recipe:
    """Read a command `learner up ...` as it is read there, but with its output in `folder`."""
    monkeypatch.setattr("learner.commands.training.check_model_exists", lambda *_: None)  # on the hub
    assert command[:2] == ["learner", "up"]
    flags = [word.replace("/runs", str(folder)) for word in command[2:]]
    return read(flags)


def check_resumes(recipe: Recipe) -> None:
    assert recipe.given["save_strategy"] == "steps"
    assert int(recipe.given["save_steps"]) < int(recipe.given["max_steps"])


def test_the_first_machine_is_the_head_and_its_training_ends_the_job(run, tmp_path: Path, monkeypatch) -> None:
    done = run(0)
    assert done.returncode == 0, done.stderr
    assert "asks 10.0.0.1:6379" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-gpus=1 ")
    recipe = recipe_of(shlex.split(calls[-1]), monkeypatch, tmp_path)
    assert recipe.options.cluster == "10.0.0.1:6379"
    assert recipe.options.servers == (1, 1)
    check_resumes(recipe)


def test_a_training_that_fails_fails_the_job(run) -> None:
    assert run(0, STATUS="2").returncode == 2


def test_the_other_machines_join_and_end_with_the_head(run, tmp_path: Path) -> None:
    done = run(1)
    assert done.returncode == 0, done.stderr
    join = "ray start --address=10.0.0.1:6379 --num-gpus=1 --block"
    assert (tmp_path / "calls").read_text().splitlines() == [join, "sleep 5", join]


@pytest.mark.parametrize("rank", [0, 1])
def test_rays_token_is_in_a_file_of_the_users_own_and_gone_at_the_end(run, tmp_path: Path, rank: int) -> None:
    done = run(rank)
    assert (tmp_path / "calls.token").read_text() == TOKEN
    assert set((tmp_path / "calls.mode").read_text().split()) == {"600"}
    assert TOKEN not in (tmp_path / "calls").read_text() + done.stdout + done.stderr
    assert os.listdir(tmp_path / "tmp") == []


def test_a_job_on_skypilot_has_the_gpus_that_it_asks_for() -> None:
    gpus = int(SKYPILOT["resources"]["accelerators"].split(":")[1])
    assert SKYPILOT["num_nodes"] * gpus == int(SKYPILOT["envs"]["SERVERS"]) + 1
    assert SKYPILOT["secrets"] == {"RAY_TOKEN": None}
    assert list(SKYPILOT["file_mounts"]) == ["/runs"]


def rayjob() -> dict[str, Any]:
    [job] = [document for document in manifests("kuberay") if document["kind"] == "RayJob"]
    return job["spec"]


def test_a_rayjob_has_the_gpus_that_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(shlex.split(rayjob()["entrypoint"]), monkeypatch, tmp_path)
    options, cluster = recipe.options, rayjob()["rayClusterSpec"]
    assert options.cluster == "auto"
    [workers] = cluster["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * workers["replicas"]
    assert gpus == options.servers[0] * options.gpus_per_server + options.learner_gpus
    check_resumes(recipe)


def test_all_nodes_of_a_rayjob_see_the_same() -> None:
    cluster = rayjob()["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    claims = [document["metadata"]["name"] for document in manifests("kuberay") if "Claim" in document["kind"]]
    for pod in pods:
        [container] = pod["containers"]
        assert container["image"] == pods[0]["containers"][0]["image"]
        assert container["volumeMounts"] == pods[0]["containers"][0]["volumeMounts"]
        assert pod["volumes"] == pods[0]["volumes"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] in claims
        assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert rayjob()["backoffLimit"] > 0, "an attempt that fails is followed by one that goes on"
    assert rayjob()["shutdownAfterJobFinishes"]


def test_rays_version_is_the_tested_one() -> None:
    pinned = (ROOT / "deploy" / "constraints-cpu.txt").read_text()
    version = rayjob()["rayClusterSpec"]["rayVersion"]
    assert f"\nray=={version} " in pinned
    assert f"ray[default]=={version}" in (ROOT / "docs" / "deploy.md").read_text()
