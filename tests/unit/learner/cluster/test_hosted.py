"""Hosted commands: started, listed when they are ready, started again, ended; and what nobody else may read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from learner.cluster.hosted import Command, Hosted, Report, place
from learner.cluster.secret_files import SecretFile
from shared.errors import NotReady

#: As a module on PYTHONPATH: says what it was given, serves /ready, and ends as it is told.
MODULE = """
import http.server, os, signal, sys
print("told", *sys.argv[1:], flush=True)
print("reads", open(sys.argv[1]).read(), flush=True)
print("sees", os.environ.get("FIRST"), os.environ.get("SECOND"), flush=True)
if "fail" in sys.argv:
    sys.exit("module: there is no way")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(7)
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer((sys.argv[2], int(sys.argv[3])), Handler)
signal.signal(signal.SIGTERM, lambda *_: (print("leaves", flush=True), os._exit(0)))
server.serve_forever()
"""
HIDDEN = "nobody-else-reads-it"


class Asker:
    """Asks a hosted command how it stands, as the driver does."""

    def __init__(self, hosted: Hosted) -> None:
        self.hosted, self.last, self.lines = hosted, Report("", ""), list[str]()

    def until(self, holds: Callable[[Report], object]) -> Report:
        while not holds(self.last):
            self.last = self.hosted.report(self.last.life, self.last.changes, self.last.seen, 10.0)
            self.lines += self.last.lines
        return self.last


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    (tmp_path / "hosted_module.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Command(
        module="hosted_module",
        arguments=(place("token"), place("host"), place("port"), '{"port": 1}'),
        secrets={"token": HIDDEN.encode()},
        url=f"http://{place('host')}:{place('port')}",
        again=True,
    )


@pytest.fixture
def hosted(command: Command) -> Iterator[Callable[..., Asker]]:
    begun: list[Hosted] = []

    def begin(**changes: Any) -> Asker:
        listed = changes.pop("listed", [].append)
        begun.append(Hosted(Command(**{**vars(command), **changes}), "127.0.0.1", {}, listed))
        return Asker(begun[-1])

    yield begin
    for each in begun:
        each.end(0.0)
        Asker(each).until(lambda report: report.over)


def test_a_command_is_told_its_place_and_listed_when_it_is_ready(hosted: Callable[..., Asker]) -> None:
    listed: list[str] = []
    asker = hosted(listed=listed.append)
    report = asker.until(lambda report: report.ready)
    assert listed == [report.url]
    asker.until(lambda _: len(asker.lines) >= 3)
    _, host, port, other = asker.lines[0].removeprefix("told ").split(" ", 3)
    assert f"http://{host}:{port}" == report.url
    assert other == '{"port": 1}'
    assert asker.lines[1] == f"reads {HIDDEN}"
    asker.hosted.end()
    assert asker.until(lambda report: report.over).status == 0
    assert asker.lines[-1] == "leaves"


def test_a_command_that_dies_is_started_again_at_its_address(hosted: Callable[..., Asker]) -> None:
    import urllib.request

    listed: list[str] = []
    asker = hosted(listed=listed.append)
    url = asker.until(lambda report: report.ready).url
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/die", timeout=30.0)
    assert asker.until(lambda report: report.ended == 1).status == 7
    asker.until(lambda report: report.ready and report.starts == 2)
    assert listed == [url, url]


def test_a_directory_that_does_not_answer_costs_no_server(hosted: Callable[..., Asker]) -> None:
    tried: list[str] = []

    def listed(url: str) -> None:
        tried.append(url)
        if len(tried) == 1:
            raise NotReady("the directory does not answer")

    asker = hosted(listed=listed)
    report = asker.until(lambda report: report.ready)
    assert (report.starts, report.ended) == (1, 0)
    assert tried == [report.url] * 2
    assert any("not listed: the directory does not answer" in line for line in asker.lines)


def test_the_reason_of_an_end_is_what_was_said_last_and_pauses_grow(hosted: Callable[..., Asker]) -> None:
    asker = hosted(arguments=(place("token"), "fail"))
    first = asker.until(lambda report: report.ended == 1)
    assert (first.status, first.reason, first.over) == (1, "module: there is no way", False)
    assert asker.until(lambda report: report.ended == 2).pause_s == 2 * first.pause_s


def test_a_command_that_is_not_to_be_started_again_is_over(hosted: Callable[..., Asker]) -> None:
    report = hosted(arguments=(place("token"), "fail"), again=False).until(lambda report: report.over)
    assert (report.starts, report.ended) == (1, 1)


def test_variables_of_the_node_come_between_defaults_and_what_is_set(
    hosted: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRST", "the node's")
    monkeypatch.setenv("SECOND", "the node's")
    asker = hosted(defaults={"FIRST": "by default"}, environment={"SECOND": "set"})
    asker.until(lambda _: len(asker.lines) >= 3)
    assert asker.lines[2] == "sees the node's set"


def test_a_secret_is_in_no_command_line_and_no_environment(hosted: Callable[..., Asker]) -> None:
    asker = hosted()
    asker.until(lambda report: report.ready)
    started = psutil.Process().children(recursive=True)
    assert started
    for process in started:
        assert HIDDEN not in " ".join(process.cmdline())
        assert HIDDEN not in str(process.environ())


def test_a_secret_file_is_this_users_alone_and_gone_with_its_process() -> None:
    with closing(SecretFile(HIDDEN.encode(), "token")) as file:
        assert Path(file.path).read_text() == HIDDEN
        assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
        assert stat.S_ISREG(os.stat(file.path).st_mode)
    assert not os.path.exists(file.path)
    script = (
        "from learner.cluster.secret_files import SecretFile as S; import os\nprint(S(b'x', 'n').path, flush=True)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script + "os.kill(os.getpid(), 9)"], capture_output=True, text=True)
    assert killed.returncode == -9
    assert not os.path.exists(killed.stdout.strip())
