"""The wheel, installed: what it holds, and that folders of the user's do not hide it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from tests.unit.deploy.files import ROOT

PACKAGES = ("learner", "rollout_server", "shared")
#: Scores with a module of the working directory, in a reward worker.
REWARD = """
from learner.rewards.calls import RewardCall
from learner.rewards.pool import RewardPool
from learner.tasks.imports import import_object
pool = RewardPool({0: ("reward", import_object("my_rewards:reward"))}, workers=1, timeout_s=60)
call = RewardCall({"prompts": ["p"], "completions": ["abc"]}, None)
print(pool.names, pool.wait(pool.submit(0, call))[0][1].rewards)
"""
#: Starts one of our modules as the demo starts server and learner.
CHILD = """
from learner.utils.processes import ProcessGroup, module_command, module_environment
with ProcessGroup([*module_command("learner.cli"), "--help"], module_environment()) as group:
    raise SystemExit(group.process.wait())
"""
WHERE = "import {0}, sys; print({0}.__file__, sys.modules['shared'].__file__)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel has been unpacked that is built of this repository's source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(sdist)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    shutil.rmtree(source)
    return folder / "site-packages"


@pytest.fixture(params=["packages", "folders", "files"])
def surroundings(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A working directory with things of the user's that have the names of our packages."""
    for name in PACKAGES:
        if request.param == "files":
            (tmp_path / f"{name}.py").write_text("raise RuntimeError('of the user')\n")
            continue
        (tmp_path / name / "runs").mkdir(parents=True)
        if request.param == "packages":
            (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of the user')\n")
    (tmp_path / "my_rewards.py").write_text("def reward(completions, **_): return [len(c) for c in completions]\n")
    return tmp_path


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_it_holds_everything_but_tests(site: Path) -> None:
    there = {path.relative_to(site) for path in site.rglob("*") if path.is_file() and ".dist-info" not in str(path)}
    files = {
        path.relative_to(ROOT)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    files |= {Path("learner") / path.relative_to(ROOT) for path in (ROOT / "recipes").iterdir()}
    assert there == files


def test_what_an_index_reads_of_it(site: Path) -> None:
    """As `twine check` wants it, but for the README's markup; the version stands in pyproject.toml and nowhere else."""
    (folder,) = site.glob("*.dist-info")
    metadata = Metadata.from_email((folder / "METADATA").read_bytes(), validate=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(metadata.version) == project["version"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    ended = run(site, site.parent, "-m", "learner.cli", "--version")
    assert ended.stdout == f"learner {project['version']}\n", ended.stderr


def test_the_demo_finds_its_recipe(site: Path, tmp_path: Path) -> None:
    demo = ("-m", "learner.demo", "--gguf", "none.gguf", "--model-dir", str(tmp_path / "model"))
    for config in ((), ("--config", "demo-gpu.yaml"), ("--config", "recipes/demo-gpu.yaml")):
        ended = run(site, tmp_path, *demo, *config)
        assert "the model: SmolLM2" in ended.stdout, ended.stderr
        assert ended.stderr == "demo: no GGUF file at none.gguf [invalid_request]\n"
    ended = run(site, tmp_path, *demo, "--config", "other.yaml")
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "demo: --config other.yaml: no such file, and no recipe of that name; recipes are additions.yaml, "
    )


@pytest.mark.parametrize("package", ["learner", "rollout_server"])
def test_shared_is_ours(site: Path, tmp_path: Path, package: str) -> None:
    """Also where Python puts the working directory first: `python -m`, `python -c`."""
    for kind in ("folder", "package"):
        (tmp_path / kind / "shared").mkdir(parents=True)
    (tmp_path / "package" / "shared" / "__init__.py").write_text("raise RuntimeError('of the user')\n")
    for kind in ("folder", "package"):
        ended = run(site, tmp_path / kind, "-c", WHERE.format(package))
        assert ended.stdout.split() == [str(site / package / "__init__.py"), str(site / "shared" / "__init__.py")]
    for kind in ("folder", "package"):
        ended = run(site, tmp_path / kind, "-m", "learner.cli", "status", "--help")
        assert ended.returncode == 0, ended.stderr


def test_another_shared_that_came_first_is_named(site: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text("")
    ended = run(site, tmp_path, "-c", "import shared, learner")
    assert ended.stderr.splitlines()[-1].startswith("ImportError: <module 'shared' from")
    assert ended.stderr.splitlines()[-1].endswith("rename yours")


def test_children_of_the_demo(site: Path, surroundings: Path) -> None:
    ended = run(site, surroundings, "-P", "-c", CHILD)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: learner COMMAND")


def test_reward_workers(site: Path, surroundings: Path) -> None:
    """Started by the console script `learner`, which finds the user's modules in the working directory all the same."""
    ended = run(site, surroundings, "-P", "-c", REWARD)
    assert ended.stdout == "{0: 'reward'} [3.0]\n", ended.stderr


def test_a_module_that_an_installed_one_hides(site: Path, tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("def reward(completions, **_): return [1.0]\n")
    code = "from learner.tasks.imports import import_object; import_object('yaml:reward')"
    ended = run(site, tmp_path, "-P", "-c", code)
    assert f"; {tmp_path / 'yaml.py'} is hidden by " in ended.stderr.splitlines()[-1]
    assert ended.stderr.splitlines()[-1].endswith("rename it [invalid_request]")
