"""One training at a time in an output_dir."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from learner.run_dir.lock import OutputLock, check_unused, wait_unused
from shared.errors import InvalidRequest

#: Holds the lock, with a child that was forked while it was held, as reward workers are.
HOLDER = """
import os, sys, time
from learner.run_dir.lock import OutputLock
lock = OutputLock(sys.argv[1])
if os.fork() == 0:
    os.close(1)
    time.sleep(600)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout
        holder.stdout.readline()
        yield holder
    finally:
        os.killpg(holder.pid, 9)
        holder.wait()


def test_the_second_is_refused_by_name(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        for attempt in (OutputLock, check_unused):
            with pytest.raises(InvalidRequest, match=rf"(?s){tmp_path} just now \(process {holder.pid}\).*output_dir"):
                attempt(tmp_path)


def test_a_killed_one_leaves_it_free_though_its_children_live(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        holder.kill()
        holder.wait()
        os.killpg(holder.pid, 0)  # the child
        OutputLock(tmp_path).close()


def test_the_end_of_another_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path) as holder, ThreadPoolExecutor() as pool:
        assert not wait_unused(tmp_path, 0.0)
        waiting = pool.submit(wait_unused, tmp_path, 600.0)
        holder.kill()
        assert waiting.result()


def test_looking_makes_nothing(tmp_path: Path) -> None:
    check_unused(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_file_systems_without_locks_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    OutputLock(tmp_path).close()
    (tmp_path / "file").touch()
    OutputLock(tmp_path / "file").close()
