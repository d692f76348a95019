"""A share of the CPU for a group of processes, so that several servers on one machine have as much each as alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PERIOD_US = 50_000


class Quota:
    """A control group, version 1 or 2, with a limit on CPU time.

    Args:
        cores: CPU seconds a second for all its processes together.

    Raises:
        OSError: control groups cannot be written here.
    """

    def __init__(self, name: str, cores: float) -> None:
        root = next(root for root in _ROOTS if root.is_dir())
        self._folder = root / f"bench-{os.getpid()}-{name}"
        self._root = root
        self._folder.mkdir()
        quota = str(int(cores * _PERIOD_US))
        if (limit := self._folder / "cpu.max").exists():
            limit.write_text(f"{quota} {_PERIOD_US}")
        else:
            (self._folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self._folder / "cpu.cfs_quota_us").write_text(quota)

    def add(self, pid: int) -> None:
        """Move a process and all its descendants into the group."""
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with contextlib.suppress(OSError, psutil.Error):  # it has just ended
                (self._folder / "cgroup.procs").write_text(str(process.pid))

    def remove(self) -> None:
        """Take the group away; its processes have no limit any more."""
        with contextlib.suppress(OSError):
            for pid in (self._folder / "cgroup.procs").read_text().split():
                (self._root / "cgroup.procs").write_text(pid)
            self._folder.rmdir()


@contextlib.contextmanager
def quotas(names: list[str], cores: float | None) -> Iterator[dict[str, Quota]]:
    """A group for each name; none without `cores`."""
    groups = {name: Quota(name, cores) for name in names} if cores else {}
    try:
        yield groups
    finally:
        for group in groups.values():
            group.remove()
