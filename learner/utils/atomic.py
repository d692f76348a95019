"""Atomic writes: a file or directory appears complete under its name, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import InvalidRequest


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o666, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path`, or what it links to, when the block succeeds.

    What is no file (a pipe, a device, `/dev/stdout`) cannot be replaced: it is yielded itself.

    Args:
        mode: permissions, of which the umask takes its part.
        durable: sync to disk before the rename.
    """
    if (path.exists() and not path.is_file()) or path.absolute().is_relative_to("/dev"):
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(mode, exist_ok=False)
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, *, mode: int = 0o666, durable: bool = False) -> None:
    """Write `text` as UTF-8, see `atomic_file`. Lone surrogates, which have no encoding, become question marks."""
    with atomic_file(path, mode=mode, durable=durable) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory, which replaces `target`, or what it links to, when the block succeeds.

    A directory that is there and empty is kept and gets the contents: it may be mounted, be a process's current one, or
    lie where its owner may not write.
    """
    target = target.resolve()
    is_filled = target.is_dir() and is_missing_or_empty(target)
    place = target if is_filled else target.parent
    place.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=place))
    building = staging / target.name
    building.mkdir()
    try:
        yield building
        mode = building.stat().st_mode & 0o666  # what the umask allows: safetensors makes its files private
        for file in filter(Path.is_file, building.iterdir()):
            file.chmod(mode)
        if is_filled:
            _move_contents(building, target)
        else:
            replace_directory(building, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_directory(staged: Path, target: Path, *, aside: Path | None = None, durable: bool = False) -> None:
    """Rename `staged` to `target`; an existing `target` is renamed to `aside` before, for the caller to remove.

    Args:
        aside: by default `replaced` beside `staged`.
        durable: sync every file to disk before the rename, and the rename itself.
    """
    if durable:
        for root, _, names in os.walk(staged):
            for path in (*(Path(root, name) for name in names), Path(root)):
                _sync(path)
    aside = aside or staged.with_name("replaced")
    if target.exists():
        target.rename(aside)
    try:
        staged.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    if durable:
        _sync(target.parent)


def _move_contents(staged: Path, target: Path) -> None:
    """Move everything in `staged` to `target`, or nothing."""
    names = [path.name for path in staged.iterdir()]
    try:
        for name in names:
            (staged / name).rename(target / name)
    except BaseException:
        for name in names:
            if (target / name).exists():
                (target / name).rename(staged / name)
        raise


def is_missing_or_empty(target: Path) -> bool:
    """Return whether writing to `target` would replace nothing."""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def check_writable(path: str | Path, option: str, *, directory: bool = False) -> None:
    """Refuse a path, given as `option`, at which no file or directory can be written: `invalid_request`."""
    target = Path(path).absolute()
    nearest = next(place for place in (target, *target.parents) if place.exists())
    if nearest == target and target.is_dir() != directory:
        raise InvalidRequest(f"{option} {path} is {'no' if directory else 'a'} directory: choose another path")
    if not os.access(nearest, os.W_OK) or (nearest != target and not nearest.is_dir()):
        raise InvalidRequest(f"{option} {path} cannot be written in {nearest}: choose another path")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
