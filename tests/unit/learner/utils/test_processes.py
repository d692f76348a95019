"""Child processes that end with the block that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from learner.utils.processes import (
    ProcessGroup,
    Stopped,
    each_signal,
    module_command,
    module_environment,
    raise_stopped,
    stop_on_signals,
)

#: Starts a process of its own, says which, and waits to be ended.
PARENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) if "alone" not in sys.argv else None
def leave(*_):
    print("leaving", flush=True)
    if "stubborn" not in sys.argv:
        sys.exit(7)
signal.signal(signal.SIGTERM, leave)
print(child.pid if child else "alone", flush=True)
while True:
    time.sleep(0.05)  # not pause(): a signal right before it would wait for another
"""


def _python(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def _begun(group: ProcessGroup, lines: list[str]) -> str:
    """Return the first line of PARENT as soon as it is there: its child's process id, if it has one."""
    while not lines:
        assert group.process.poll() is None
        os.sched_yield()
    return lines[0]


def test_the_end_of_the_block_ends_the_whole_group_and_keeps_its_last_words() -> None:
    lines: list[str] = []
    with ProcessGroup(_python(PARENT), {}, lines.append) as group:
        child = psutil.Process(int(_begun(group, lines)))
    assert group.process.returncode == 7, "it was asked first"
    assert lines[1:] == ["leaving"]
    assert not psutil.wait_procs([child], timeout=30.0)[1]


def test_who_does_not_leave_is_killed() -> None:
    lines: list[str] = []
    with ProcessGroup(_python(PARENT, "stubborn", "alone"), {}, lines.append, patience_s=0.0) as group:
        _begun(group, lines)
    assert group.process.returncode == -signal.SIGKILL


def test_a_signal_while_it_waits_ends_the_group_at_once() -> None:
    """With more patience than this test has time."""
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        if line == "leaving":
            os.kill(os.getpid(), signal.SIGINT)

    with (
        pytest.raises(Stopped, match="SIGINT"),
        stop_on_signals(),
        ProcessGroup(_python(PARENT, "stubborn"), {}, take, patience_s=3600.0) as group,
    ):
        child = psutil.Process(int(_begun(group, lines)))
    assert group.process.returncode == -signal.SIGKILL
    assert not psutil.wait_procs([child], timeout=30.0)[1]


@pytest.mark.parametrize("handled", [stop_on_signals, partial(each_signal, raise_stopped, signal.SIGINT)])
def test_a_signal_is_not_lost_where_python_drops_exceptions(handled: Callable[[], Any]) -> None:
    """As in callbacks of weak references, of which every import has one."""
    before = sys.unraisablehook
    with pytest.raises(Stopped, match="SIGINT"), handled():
        kept = {1}
        dropped = weakref.ref(kept, lambda _: os.kill(os.getpid(), signal.SIGINT))
        del kept
        assert dropped() is None
        time.sleep(20.0)
    assert sys.unraisablehook is before


def test_one_that_has_ended_by_itself() -> None:
    with ProcessGroup(_python("import sys; sys.exit(3)"), {}) as group:
        group.process.wait()
    assert group.end() == 3


def test_its_output_goes_into_a_file_and_its_environment_is_given(tmp_path: Path) -> None:
    program = "import os, sys; print(os.environ['GIVEN'], len(sys.stdin.read())); print('error', file=sys.stderr)"
    with ProcessGroup(_python(program), {"GIVEN": "yes"}, tmp_path / "log") as group:
        group.process.wait()
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "error", "yes 0"]


def test_it_runs_on_the_cores_that_it_is_given() -> None:
    lines: list[str] = []
    core = min(os.sched_getaffinity(0))
    with ProcessGroup(_python("import os; print(os.sched_getaffinity(0))"), {}, lines.append, cores=[core]) as group:
        group.process.wait()
    assert lines == [str({core})]


def test_ctrl_c_in_the_terminal_does_not_reach_it() -> None:
    lines: list[str] = []
    with ProcessGroup(_python(PARENT, "alone"), {}, lines.append) as group:
        _begun(group, lines)
        assert os.getsid(group.process.pid) == group.process.pid


def test_a_command_that_does_not_exist_leaves_signals_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(FileNotFoundError):
        ProcessGroup(["no-such-command-of-this-machine"], {})
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_reader_that_is_killed_takes_its_command_along() -> None:
    program = (
        "import os, signal, sys; from learner.utils.processes import ProcessGroup\n"
        f"group = ProcessGroup([sys.executable, '-c', {PARENT!r}], {{}}, lambda line: print(line, flush=True))\n"
        "print(group.process.pid, flush=True); signal.pause()"
    )
    environment = {**os.environ, **module_environment()}
    reader = subprocess.Popen(_python(program), stdout=subprocess.PIPE, text=True, env=environment)
    assert reader.stdout
    started = {psutil.Process(int(reader.stdout.readline())) for _ in range(2)}
    command = next(process for process in started if process.ppid() == reader.pid)
    reader.kill()
    reader.wait()
    assert not psutil.wait_procs([command], timeout=30.0)[1]
    for process in started - {command}:
        process.kill()


def test_our_modules_win_over_folders_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "__init__.py").write_text("raise SystemExit('not this one')")
    environment = {**os.environ, **module_environment()}
    done = subprocess.run([*module_command("learner.cli"), "--version"], cwd=tmp_path, env=environment)
    assert done.returncode == 0
