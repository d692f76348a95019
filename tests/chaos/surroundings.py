"""Surroundings of the processes that can be broken: clock, disk, network. Each raises where it is unavailable."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path


class UnavailableError(Exception):
    """This machine does not permit something, or lacks it."""


def _run(*command: str) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UnavailableError(f"there is no `{command[0]}`") from None
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"`{' '.join(command)}` failed: {error.stderr.strip()[:200]}") from None


class Clock:
    """Wall clock of the processes that run with its `environment`; it can jump while they run."""

    def __init__(self, folder: Path, name: str) -> None:
        library = folder / "clock.so"
        if not library.exists():
            compiler = shutil.which("cc")
            if compiler is None:
                raise UnavailableError("clock jumps need a C compiler (cc)")
            _run(compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(Path(__file__).with_name("clock.c")))
        file = folder / f"{name}.clock"
        file.write_bytes(bytes(8))
        with file.open("r+b") as stream:
            self._page = mmap.mmap(stream.fileno(), 8)
        self.environment = {"LD_PRELOAD": str(library), "LOCKSTEP_CLOCK": str(file)}

    def set(self, seconds: float) -> None:
        """Set how far it is ahead of the true time."""
        self._page[:8] = struct.pack("q", round(seconds * 1e9))


class SharedMemory:
    """Replacement of /dev/shm for the processes of one suite, to find segments they leave behind."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        _run("mount", "-t", "tmpfs", "tmpfs", str(folder))
        try:
            _run(*self.prefix, "true")
        except UnavailableError as error:
            self.close()
            raise UnavailableError(f"mount namespaces: {error}") from error

    @property
    def prefix(self) -> list[str]:
        """Return the command prefix with which a process uses it."""
        return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/shm && exec "$@"', str(self.folder)]

    def left(self) -> list[str]:
        """Return the names of its segments, except those that NCCL leaves where a process is killed."""
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("nccl-"))

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=False)


class Disk:
    """A small separate disk, which can be filled."""

    def __init__(self, folder: Path, mebibytes: int = 96) -> None:
        folder.mkdir(parents=True)
        self.folder, self._ballast = folder, folder / "ballast"
        _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder))

    def fill(self, but: int) -> None:
        """Fill the disk except for `but` bytes."""
        with self._ballast.open("wb", buffering=0) as stream:
            for size in (2**20, 2**12):
                with contextlib.suppress(OSError):
                    while True:
                        stream.write(bytes(size))
            stream.truncate(max(stream.tell() - but, 0))

    def free(self) -> None:
        """Remove what `fill` wrote."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it, but keep its files in the same place."""
        kept = self.folder.with_name(self.folder.name + ".kept")
        shutil.copytree(self.folder, kept)
        subprocess.run(["umount", "-l", str(self.folder)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        kept.rename(self.folder)


class Network:
    """A network namespace for the learner, connected to this one by a wire; the proxy listens on `host`."""

    def __init__(self, name: str) -> None:
        number = os.getpid() % 250
        self.name, self._wire = f"lockstep-{name}", f"ls{os.getpid() % 10**6}"
        self.host, inside = f"10.213.{number}.1", f"10.213.{number}.2"
        try:
            _run("ip", "netns", "add", self.name)
            _run("ip", "link", "add", self._wire, "type", "veth", "peer", "name", "wire", "netns", self.name)
            _run("ip", "addr", "add", f"{self.host}/30", "dev", self._wire)
            _run("ip", "link", "set", self._wire, "up")
            for command in (f"addr add {inside}/30 dev wire", "link set wire up", "link set lo up"):
                _run("ip", "-n", self.name, *command.split())
        except UnavailableError as error:
            self.close()
            raise UnavailableError(f"network namespaces: {error}") from error

    @property
    def prefix(self) -> list[str]:
        """Return the command prefix with which a process runs inside."""
        return ["ip", "netns", "exec", self.name]

    def wire(self, up: bool) -> None:
        """Connect or cut the wire; while it is cut, packets are lost without an error."""
        _run("ip", "link", "set", self._wire, "up" if up else "down")

    def close(self) -> None:
        """Delete it."""
        with contextlib.suppress(FileNotFoundError):
            for command in (f"link del {self._wire}", f"netns del {self.name}"):
                subprocess.run(["ip", *command.split()], check=False, capture_output=True)
