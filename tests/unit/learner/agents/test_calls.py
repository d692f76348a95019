"""Agents that are functions or programs: their rewards, time limits and failures."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from learner.agents import calls
from learner.agents.agent_session import AgentSession
from learner.agents.calls import AgentFailed, FunctionAgent, ProgramAgent, agent_of
from learner.utils.processes import module_environment
from shared.errors import InvalidRequest
from shared.sessions import SessionOpened

ROW = {"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": "2"}


def make_session(timeout_s: float = 60.0, **known) -> AgentSession:
    opened = SessionOpened(session_id="s1", token="secret", path="/v1/sessions/s1/v1", version=None)
    return AgentSession.of(opened, "http://127.0.0.1:1", timeout_s=timeout_s, **known)


def test_sdks_find_the_session_in_their_variables():
    found = make_session().environment
    assert found["OPENAI_BASE_URL"] == "http://127.0.0.1:1/v1/sessions/s1/v1"
    assert found["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:1/v1/sessions/s1"
    assert found["OPENAI_API_KEY"] == found["ANTHROPIC_API_KEY"] == found["ANTHROPIC_AUTH_TOKEN"] == "secret"
    assert "secret" not in repr(make_session()), "logs do not show it"


def test_the_openai_client_suits_the_agent():
    openai = pytest.importorskip("openai")
    assert isinstance(make_session().openai(), openai.AsyncOpenAI)
    client = make_session(is_async=False).openai()
    assert isinstance(client, openai.OpenAI)
    assert str(client.base_url).startswith("http://127.0.0.1:1/v1/sessions/s1/v1")
    assert client.max_retries == 0, "a call that is sent again would be sampled again"


class NoModels(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"object": "list", "data": []}')

    def log_message(self, *args):
        pass


def test_calls_go_through_no_proxy(tmp_path, monkeypatch):
    """As the learner's own: on a cluster $HTTP_PROXY leads to the internet, and reaches no rollout server."""
    pytest.importorskip("openai")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    monkeypatch.delenv("no_proxy", raising=False)
    with HTTPServer(("127.0.0.1", 0), NoModels) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base_url = f"http://127.0.0.1:{server.server_port}/v1"
        agent = FunctionAgent(lambda session, row: float(len(session.openai(base_url=base_url).models.list().data)))
        assert agent.run(make_session(is_async=False), ROW) == 0
        server.shutdown()
    run(f"env > {tmp_path}/env")
    seen = (tmp_path / "env").read_text().splitlines()
    assert {"NO_PROXY=internal.example,127.0.0.1", "no_proxy=internal.example,127.0.0.1"} <= set(seen)


def test_without_the_sdk_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(Exception, match=r"pip install openai.*session\.base_url"):
        make_session().openai()


@pytest.mark.parametrize(("value", "reward"), [(1, 1.0), (True, 1.0), (0.25, 0.25), (None, None)])
def test_a_function_returns_a_reward(value, reward):
    async def agent_later(session, row):
        await asyncio.sleep(0)
        return value

    assert FunctionAgent(lambda session, row: value).run(make_session(), ROW) == reward
    assert FunctionAgent(agent_later).run(make_session(), ROW) == reward


def test_a_class_is_no_agent_but_its_object_is():
    class Adder:
        async def __call__(self, session, row):
            return 1.0

    with pytest.raises(InvalidRequest, match="'Adder' is a class: give a function"):
        agent_of(None, None, Adder)
    assert agent_of(None, None, Adder()).run(make_session(), ROW) == 1.0


def test_an_agent_that_writes_in_its_row_changes_it_for_no_other_run():
    def agent(session, row):
        messages = row["prompt"]
        messages.append({"role": "assistant", "content": "2"})
        messages[0]["content"] += " 2"
        return len(messages)

    for _ in range(2):
        assert FunctionAgent(agent).run(make_session(), ROW) == 2
    assert ROW["prompt"] == [{"role": "user", "content": "1 + 1 ="}]


@pytest.mark.parametrize("value", ["good", float("nan"), float("inf"), [1.0]])
def test_what_is_no_reward_is_a_failure(value):
    with pytest.raises(AgentFailed, match="not a reward"):
        FunctionAgent(lambda session, row: value).run(make_session(), ROW)


def test_a_failure_has_the_agents_own_traceback():
    async def agent(session, row):
        raise TimeoutError("the tool's own")

    with pytest.raises(AgentFailed, match="the tool's own") as caught:
        FunctionAgent(agent).run(make_session(), ROW)
    assert "in agent" in caught.value.details
    assert "threads.py" not in caught.value.details
    with pytest.raises(AgentFailed, match="SystemExit"):
        FunctionAgent(lambda session, row: sys.exit(3)).run(make_session(), ROW)


def test_an_agent_that_stalls_is_given_up():
    cancelled, release = threading.Event(), threading.Event()

    async def waits(session, row):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    for agent in (waits, lambda session, row: release.wait()):
        with pytest.raises(AgentFailed, match=r"within 0\.05 s"):
            FunctionAgent(agent).run(make_session(0.05), ROW)
    assert cancelled.wait(60)
    release.set()


def run(command: str, timeout_s: float = 60.0) -> float | None:
    return ProgramAgent(command).run(make_session(timeout_s), ROW)


def test_a_program_finds_its_row_and_session(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_TOKEN", "opens-everything")
    out = tmp_path / "seen"
    assert run(f'cat "$LOCKSTEP_ROW_FILE" > {out}; env > {out}.env') is None
    assert json.loads(out.read_text()) == ROW
    seen = dict(line.split("=", 1) for line in Path(f"{out}.env").read_text().splitlines() if "=" in line)
    assert json.loads(seen["LOCKSTEP_ROW"]) == ROW
    assert seen["OPENAI_API_KEY"] == "secret"  # pragma: allowlist secret
    assert seen["LOCKSTEP_SESSION_URL"] == "http://127.0.0.1:1/v1/sessions/s1"
    assert "LOCKSTEP_TOKEN" not in seen, "the server's token opens more than the session"
    assert not Path(seen["LOCKSTEP_ROW_FILE"]).exists()


@pytest.mark.parametrize(
    ("command", "reward"),
    [
        ('echo 0.5 > "$LOCKSTEP_REWARD_FILE"', 0.5),
        ('echo reward: 1; echo 0.5 > "$LOCKSTEP_REWARD_FILE"', 0.5),
        ("echo reward: 0.75", None),  # what a program prints may be the model's text
    ],
)
def test_a_program_writes_its_reward(command, reward):
    assert run(command) == reward


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("echo lost >&2; exit 3", "exit code 3"),
        ('echo good > "$LOCKSTEP_REWARD_FILE"', "LOCKSTEP_REWARD_FILE holds 'good'"),
        ('echo nan > "$LOCKSTEP_REWARD_FILE"', "LOCKSTEP_REWARD_FILE holds 'nan'"),
    ],
)
def test_a_program_fails(command, match):
    with pytest.raises(AgentFailed, match=match) as caught:
        run(command)
    assert caught.value.details == ("lost\n" if "lost" in command else "")


def test_only_the_end_of_what_a_program_says_is_kept():
    """A file that its stderr went to would fill the disk: here it may hold 50 KiB."""
    with pytest.raises(AgentFailed, match="exit code 3") as caught:
        run("ulimit -f 100; yes | head -c 1000000 >&2; echo lost >&2; exit 3")
    assert caught.value.details.endswith("y\nlost\n")
    assert len(caught.value.details) == 2000


def test_a_program_that_stalls_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "GRACE_S", 0.1)
    fifo, children = tmp_path / "fifo", tmp_path / "children"
    os.mkfifo(fifo)
    with pytest.raises(AgentFailed, match="within 3 s"):
        run(f"sleep 1000 & echo $! > {children}; trap '' TERM; cat {fifo}", timeout_s=3.0)
    assert has_ended(int(children.read_text()))


def has_ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize("end", ["true", "exit 3"])
def test_what_a_program_started_in_a_session_of_its_own_ends_with_it(tmp_path, end):
    children = tmp_path / "children"
    command = f"setsid sh -c 'echo $$ > {children}.new; mv {children}.new {children}; sleep 1000; true' & "
    command += f"while [ ! -e {children} ]; do sleep 0.05; done; {end}"
    if end == "true":
        run(command)
    else:
        with pytest.raises(AgentFailed):
            run(command)
    assert has_ended(int(children.read_text()))


def test_a_program_ends_where_the_process_above_its_supervisor_is_killed(tmp_path):
    """As Ray does, which kills the children of an actor that it ends, while the actor may go on for a moment."""
    children = tmp_path / "children"
    command = f"setsid sleep 1000 & echo $! > {children}; "
    command += "read -r _ _ _ leader _ < /proc/$PPID/stat; kill -KILL $leader; sleep 1000; true"
    with pytest.raises(AgentFailed, match="exit code -9"):
        run(command)
    for _ in range(600):
        if has_ended(int(children.read_text())):
            break
        time.sleep(0.1)
    assert has_ended(int(children.read_text()))


LEARNER = """
import sys
from learner.agents.agent_session import AgentSession
from learner.agents.calls import ProgramAgent
session = AgentSession("s1", "http://127.0.0.1:1", "http://127.0.0.1:1/v1", "secret")
ProgramAgent(sys.argv[1]).run(session, {"prompt": "w1"})
"""


def test_a_program_ends_with_a_learner_that_is_killed(tmp_path):
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    command = f'exec 3>{fifo}; sh -c "sleep 1000; true" & setsid sh -c "sleep 1000; true" & '
    command += 'echo "$LOCKSTEP_ROW_FILE" >&3; sleep 1000; true'
    learner = subprocess.Popen([sys.executable, "-c", LEARNER, command], env={**os.environ, **module_environment()})
    try:
        with fifo.open() as alive:
            row_file = Path(alive.readline().strip())
            assert row_file.is_file()
            learner.kill()
            learner.wait()
            assert alive.read() == "", "its end comes when no process of the program is left"
    finally:
        learner.kill()
        learner.wait()
    for _ in range(600):
        if not row_file.parent.exists():
            break
        time.sleep(0.1)
    assert not row_file.parent.exists()


def test_a_program_sees_no_path_of_ours(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run(f"env > {tmp_path}/env")
    assert "PYTHONPATH" not in (tmp_path / "env").read_text()
