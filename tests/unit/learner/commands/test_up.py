"""`learner up`: where both processes run, what each is told, and how they end; over processes that only pretend."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from learner.cli import main
from learner.commands import training, up
from learner.monitors.page_server import CHOSEN_PORT
from shared.errors import InvalidRequest

SERVER = """
import http.server, os, signal, sys, threading
port = int(sys.argv[sys.argv.index("--port") + 1])
print("loading on", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
print("loudness", os.environ.get("LOUDNESS"), flush=True)
if "--broken" in sys.argv:
    sys.exit("rollout-server: the engine could not start")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 503)
        self.end_headers()
        if self.path == "/die":
            print("rollout-server: the engine died", flush=True)
            print("INFO:     Finished server process [7]", flush=True)
            os._exit(1)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
def leave(*_):
    print("server leaves", flush=True)
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, leave)
server.serve_forever()
"""
LEARNER = """
import os, signal, sys, time, urllib.request
url = sys.argv[sys.argv.index("--rollout_url") + 1]
print("options", *sys.argv[1:], flush=True)
print("loudness", os.environ.get("LOUDNESS"), flush=True)
if "--wrong" in sys.argv:
    print("learner train: there is no --wrong", file=sys.stderr, flush=True)
    sys.exit(2)
def leave(*_):
    print("learner saves", flush=True)
    if "--stubborn" not in sys.argv:
        sys.exit(143)
signal.signal(signal.SIGTERM, leave)
while True:
    try:
        urllib.request.urlopen(url + "/ready").close()
        break
    except OSError:
        time.sleep(0.02)
print("step 1", flush=True)
if "--killed" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "--kills-server" in sys.argv:
    try:
        urllib.request.urlopen(url + "/die")
    except OSError:
        pass
while "--long" in sys.argv or "--kills-server" in sys.argv:
    time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the two commands, in a folder of the test, on a machine without GPUs."""
    scripts = {"rollout_server.cli": SERVER, "learner.cli": LEARNER}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "tiny").mkdir()  # a model that is not looked for on the hub
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(up, "module_command", lambda name: [sys.executable, str(tmp_path / f"{name}.py")])
    monkeypatch.setattr(training, "check", lambda argv: None)  # of flags and models that only pretend, too
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: tiny\ndtype: float32\nuse_cpu: true\nserver:\n  max-num-seqs: 8\n")
    return path


def test_one_command_for_both(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--config", str(recipe), "--max_steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert "learner | step 1\n" in shown
    assert "server  | server leaves\n" in shown
    assert shown.index("step 1") < shown.index("server leaves")
    out = Path("runs/mine")
    assert "server leaves\n" in (out / "server.log").read_text()
    told = (out / "learner.log").read_text().splitlines()[0].split()
    assert told[1:4] == ["train", "--config", str(recipe)]
    at = told.index("--rollout_url")
    assert told[at + 2 : at + 4] == ["--output_dir", "runs/mine"]
    assert "--max_steps" in told


def test_a_server_that_does_not_start_is_said_with_its_reason(recipe: Path, capsys) -> None:
    assert main(["up", "--config", str(recipe), "--server-flags", "--broken"]) == 1
    shown = capsys.readouterr().out
    reason = "the server ended with status 1: rollout-server: the engine could not start"
    assert shown.splitlines()[-1] == f"up      | {reason}"
    assert "the same command begins anew, since nothing was saved yet\n" in shown


def test_a_server_that_dies_ends_the_learner_in_order(recipe: Path, capsys) -> None:
    assert main(["up", "--config", str(recipe), "--kills-server"]) == 1
    shown = capsys.readouterr().out
    assert "learner | learner saves\n" in shown
    assert shown.splitlines()[-1] == "up      | the server ended with status 1: rollout-server: the engine died"


def test_a_learner_that_refuses_its_options_ends_the_server(recipe: Path, capsys) -> None:
    assert main(["up", "--config", str(recipe), "--wrong"]) == 2
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "up      | the learner ended with status 2: learner train: there is no --wrong"


def test_a_process_that_is_killed_is_said_with_the_signal(recipe: Path, capsys) -> None:
    assert main(["up", "--config", str(recipe), "--killed"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("up      | the learner ended with SIGKILL (which the system sends when memory runs out")
    assert last.endswith(": step 1")


def test_how_it_goes_on_is_said(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(up, "last_checkpoint", lambda out: out / "checkpoint-4")
    assert main(["up", "--config", str(recipe), "--killed"]) == 1
    assert "the same command goes on from checkpoint-4\n" in capsys.readouterr().out


def _up(recipe: Path, *flags: str) -> subprocess.Popen[str]:
    """The command as a process of its own, whose learner has made a step."""
    program = (
        "import sys; from learner.commands import training, up; "
        "training.check = lambda argv: None; "
        f"up.module_command = lambda name: [sys.executable, {str(recipe.parent)!r} + '/' + name + '.py']; "
        "from learner.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    root = str(Path(__file__).parents[4])
    command = [sys.executable, "-c", program, "up", "--config", str(recipe), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    assert process.stdout
    assert any("step 1" in line for line in process.stdout)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_learner_then_the_server(recipe: Path, number: signal.Signals) -> None:
    process = _up(recipe, "--long")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    words = ["ending the learner", "learner saves", "server leaves", "the same command begins anew"]
    places = [said.index(word) for word in words]
    assert places == sorted(places)


def test_a_second_signal_waits_for_nobody(recipe: Path) -> None:
    process = _up(recipe, "--long", "--stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stdout
    assert any("learner saves" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)  # less than the learner's patience
    assert process.returncode == 130
    assert "the same command begins anew" in said


def test_children_do_not_outlive_a_command_that_is_killed(recipe: Path) -> None:
    process = _up(recipe, "--long")
    process.kill()
    log = recipe.parent / "runs" / "mine" / "server.log"
    process.wait()
    url = next(word for word in (log.parent / "learner.log").read_text().split() if word.startswith("http://"))
    deadline = time.monotonic() + 60
    while _answers(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/ready", timeout=5.0).is_success
    except httpx.HTTPError:
        return False


def _plan(recipe: Path, text: str, *flags: str) -> up.Plan:
    recipe.write_text(f"model_name_or_path: tiny\n{text}\n")
    return up.make_plan(["--config", str(recipe), *flags])


def test_places(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(plan: up.Plan) -> list[str | None]:
        own = (plan.server_environment, plan.learner_environment)
        return [{**plan.environment, **one}.get("CUDA_VISIBLE_DEVICES") for one in own]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert visible(_plan(recipe, "")) == ["4", "5"]
    assert visible(_plan(recipe, "server:\n  gpus: 5,6")) == ["5,6", "4"]
    shared = _plan(recipe, "share_gpu: true")
    assert visible(shared) == ["4", "4"]
    assert "--share-gpu" in shared.server
    assert visible(_plan(recipe, "", "--share_gpu", "--seed", "1")) == ["4", "4"]
    for text, words in (
        ("server:\n  gpus: 4,5,6", "no other is left"),
        ("server:\n  gpus: 7", "7 is not visible"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            _plan(recipe, text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(InvalidRequest, match="share_gpu: true"):
        _plan(recipe, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InvalidRequest, match="use_cpu: true"):
        _plan(recipe, "")


def test_the_page_is_served_unless_the_recipe_says_otherwise(recipe: Path) -> None:
    def port(text: str, *flags: str) -> str | None:
        words = _plan(recipe, f"use_cpu: true\n{text}", *flags).learner
        return words[words.index("--page_port") + 1] if "--page_port" in words else None

    with socket.socket() as taken:
        try:  # a free port then; so it is where somebody else has it
            taken.bind(("127.0.0.1", up.PAGE_PORT))
            taken.listen()
        except OSError:
            pass
        assert port("") not in (None, str(up.PAGE_PORT))
    plan = _plan(recipe, "use_cpu: true")
    assert plan.learner_environment[CHOSEN_PORT] == plan.learner[plan.learner.index("--page_port") + 1]
    assert CHOSEN_PORT not in _plan(recipe, "use_cpu: true", "--page_port", "9000").learner_environment
    assert port("", "--page_port", "9000") == "9000"
    for text in ("page_port: 9000", "page_port:", "run_page: false"):
        assert port(text) is None
    assert port("", "--no_run_page") is None


def test_cores_are_split(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2})
    plan = _plan(recipe, "use_cpu: true", "--split-cores")
    assert (plan.server_cores, plan.learner_cores) == ([1], [2, 3])


def test_a_second_one_in_the_same_folder_starts_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = _up(recipe, "--long")
    log = recipe.parent / "runs" / "mine" / "server.log"
    before = log.read_text()
    assert main(["up", "--config", str(recipe)]) == 2
    assert f"process {process.pid}" in capsys.readouterr().err
    assert log.read_text() == before
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_second_signal_may_come_at_any_moment(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Here it comes before anything waits for the learner to end."""
    monkeypatch.setattr(up, "LEARNER_PATIENCE_S", 100_000.0)
    say, take = up.say, up.Output.__call__

    def say_and_signal(text: str) -> None:
        say(text)
        if "a second signal" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    def take_and_signal(self: up.Output, line: str) -> None:
        take(self, line)
        if line == "step 1":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(up, "say", say_and_signal)
    monkeypatch.setattr(up.Output, "__call__", take_and_signal)
    assert main(["up", "--config", str(recipe), "--long", "--stubborn"]) == 130
    assert "the same command begins anew" in capsys.readouterr().out


def test_the_recipes_environment_reaches_both(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOUDNESS", "0")
    recipe.write_text(recipe.read_text() + "env:\n  LOUDNESS: 11\n")
    assert main(["up", "--config", str(recipe)]) == 0
    for log in ("server.log", "learner.log"):
        assert "loudness 11" in (recipe.parent / "runs" / "mine" / log).read_text()
