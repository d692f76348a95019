"""A share of the CPU for groups of processes, so that several servers on one machine have as much each as alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PERIOD_US = 50_000


@contextlib.contextmanager
def quotas(names: Sequence[str], cores: float | None) -> Iterator[Callable[[str, int], None]]:
    """Make a control group, version 1 or 2, for each name, with a limit on CPU time; without `cores` there is none.

    Args:
        cores: CPU seconds a second for all processes of a group together.

    Yields:
        A function that moves a process and all its descendants into the group of a name.

    Raises:
        OSError: control groups cannot be written here.
    """
    root = next((root for root in _ROOTS if root.is_dir()), _ROOTS[1])
    groups = {name: root / f"bench-{os.getpid()}-{name}" for name in names} if cores else {}

    def move(name: str, pid: int) -> None:
        if name in groups:
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                with contextlib.suppress(OSError, psutil.Error):  # it has just ended
                    (groups[name] / "cgroup.procs").write_text(str(process.pid))

    try:
        for folder in groups.values():
            folder.mkdir()
            quota = str(int((cores or 0) * _PERIOD_US))
            if (limit := folder / "cpu.max").exists():
                limit.write_text(f"{quota} {_PERIOD_US}")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(quota)
        yield move
    finally:
        for folder in groups.values():
            with contextlib.suppress(OSError):
                for pid in (folder / "cgroup.procs").read_text().split():
                    (root / "cgroup.procs").write_text(pid)
                folder.rmdir()
