"""Atomic replacement of files and directories: nothing partial, nothing left over, no wrong permissions."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from learner.utils.atomic import atomic_directory, atomic_file, write_atomically


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_is_replaced_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "first \ud800")
    assert path.read_text() == "first ?"
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first ?"
    assert _mode(path) == 0o644
    write_atomically(path, "secret", mode=0o600, durable=True)
    assert _mode(path) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    there, link = tmp_path / "there.json", tmp_path / "link.json"
    link.symlink_to(there)
    for text in ("first", "second"):
        write_atomically(link, text)
        assert there.read_text() == text
    assert link.is_symlink()


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "all")
        assert os.read(reader, 10) == b"all"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    ends = os.pipe()
    write_atomically(Path(f"/dev/fd/{ends[1]}"), "all")
    assert os.read(ends[0], 10) == b"all"


def test_a_file_behind_a_descriptor_is_not_replaced(tmp_path: Path) -> None:
    """As `--json /dev/stdout` with stdout in a file."""
    with (tmp_path / "log").open("w") as log:
        write_atomically(Path(f"/dev/fd/{log.fileno()}"), "all")
        assert os.fstat(log.fileno()).st_ino == (tmp_path / "log").stat().st_ino
    assert (tmp_path / "log").read_text() == "all"


def test_a_directory_is_replaced_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        with atomic_directory(target) as building:
            (building / "weights").touch(0o600)
            (building / "weights").write_text(text)
        assert (target / "weights").read_text() == text
    assert _mode(target) == 0o755
    assert _mode(target / "weights") == 0o644
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if to == target and path.name == target.name:
            raise OSError("no space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"), atomic_directory(target):
        pass
    assert (target / "weights").read_text() == "second", "what had been moved aside is put back"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be mounted, be the current one, or lie where nothing else may be written."""
    target = tmp_path / "model"
    target.mkdir()
    before = target.stat().st_ino
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.is_relative_to(target) and to == target / "b":
            raise OSError("no space left on device")
        return rename(path, to)

    for outcome in ("fails", "succeeds"):
        with monkeypatch.context() as patch:
            if outcome == "fails":
                patch.setattr(Path, "rename", fail)
            with contextlib.suppress(OSError), atomic_directory(target) as building:
                for name in ("a", "b", "c"):
                    (building / name).touch()
        assert sorted(path.name for path in target.iterdir()) == ([] if outcome == "fails" else ["a", "b", "c"])
    assert target.stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("there", ["nothing", "empty", "earlier"])
def test_a_link_to_a_directory_stays_one(tmp_path: Path, there: str) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "model")
    if there != "nothing":
        (disk / "model").mkdir()
    if there == "earlier":
        (disk / "model" / "old").touch()
    with atomic_directory(link) as building:
        (building / "weights").touch()
        assert building.is_relative_to(disk), "what is built may be too large for the link's own disk"
    assert link.is_symlink()
    assert [path.name for path in (disk / "model").iterdir()] == ["weights"]
    assert [path.name for path in disk.iterdir()] == ["model"]
