"""Memory in which the server, or one worker of another host, has an adapter for all workers beside it."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SharedMemory:
    """Memory that other processes of this machine open by path.

    It has no name in any file system and ends with its last user.
    """

    descriptor: int
    number: int = field(default_factory=itertools.count().__next__)  # never reused, unlike descriptors and paths

    @classmethod
    def make(cls) -> SharedMemory:
        """Make an empty one."""
        return cls(os.memfd_create("lockstep-adapter"))

    @property
    def path(self) -> str:
        """Path for processes of the same user."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def free(self) -> None:
        """Close it; processes that map it keep its pages."""
        os.close(self.descriptor)

    def write(self, data: bytes, start: int) -> None:
        """Write `data` at byte `start`; raises `OSError` without memory for it."""
        while data:
            written = os.pwrite(self.descriptor, data, start)
            data, start = data[written:], start + written

    def read(self, start: int, size: int) -> bytes:
        """Return at most `size` bytes from byte `start` on."""
        return os.pread(self.descriptor, size, start)


def place() -> str:
    """Return a name for all processes that can open the memory of this one: one machine, one space of process ids."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{boot.read().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"
