"""Files that hold secrets and lie on no disk."""

from __future__ import annotations

import os


class SecretFile:
    """A file in memory that only this user reads, by a path, as long as this process has it open.

    It is gone with the process, also with one that is killed.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self._descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        os.fchmod(self._descriptor, 0o600)
        with os.fdopen(os.dup(self._descriptor), "wb") as file:
            file.write(content)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Forget it."""
        os.close(self._descriptor)
