"""Discovery of rollout servers: fixed URLs, or what may change: addresses of a DNS name, a file, a Ray cluster."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from learner.cluster.directory import members
from learner.utils.wording import option
from shared.errors import InvalidRequest, LockstepError

DNS = "dns+"
FILE = "file:"
RAY = "ray:"

logger = logging.getLogger("lockstep.servers")


class ServerDiscovery:
    """Current URLs of the rollout servers.

    Args:
        sources: `http(s)://HOST:PORT`; `dns+http://NAME:PORT` for every address of the name (a headless service);
            `file:PATH` for a file with one URL a line, `#` for comments; `ray:NAME` for the servers that
            `learner up --cluster` has started on a Ray cluster under that name.

    Raises:
        InvalidRequest: another form, or no source.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        if not sources:
            raise InvalidRequest(f"give {option('rollout_url', 'http://127.0.0.1:8000')}, the rollout server's URL")
        for source in sources:
            if source.startswith(RAY):
                members(source.removeprefix(RAY))
            elif source.startswith(FILE):
                try:
                    _listed(source)
                except OSError as error:
                    raise InvalidRequest(f"rollout_url {source!r}: {error}") from error
            elif not _is_url(source.removeprefix(DNS)):
                raise InvalidRequest(
                    f"rollout_url {source!r} must start with http:// or https://, be dns+http://NAME:PORT for all "
                    "addresses of a name, file:PATH for a file with one URL a line, or ray:NAME on a Ray cluster"
                )
            elif source.startswith(DNS + "https:"):
                raise InvalidRequest(
                    f"rollout_url {source!r}: a certificate is for a name, not for the addresses behind it; list the "
                    "servers' own names in a file (file:PATH)"
                )
        self._sources = list(sources)
        #: Whether `urls` may return something else later.
        self.may_change = any(source.startswith((DNS, FILE, RAY)) for source in sources)
        self._last: dict[str, list[str]] = {}
        self._problems: dict[str, str] = {}

    def urls(self) -> list[str]:
        """Return all URLs, each once. A source that cannot be read now keeps its last URLs, with a warning."""
        return list(dict.fromkeys(url.rstrip("/") for source in self._sources for url in self._resolve(source)))

    def _resolve(self, source: str) -> list[str]:
        try:
            if source.startswith(DNS):
                parts = urlsplit(source.removeprefix(DNS))
                port = parts.port or 80
                entries = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
                hosts = sorted({str(entry[4][0]) for entry in entries})
                found = [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in hosts]
            elif source.startswith(FILE):
                found = _listed(source)
            elif source.startswith(RAY):
                found = sorted(members(source.removeprefix(RAY)))
            else:
                return [source]
            self._last[source] = found or self._last.get(source, [])  # it may be about to be written
        except (OSError, LockstepError) as error:
            if self._problems.get(source) != str(error):  # not at every poll
                self._problems[source] = str(error)
                logger.warning("rollout_url %s: %s; the servers stay as they were", source, error)
        return self._last.get(source, [])


def _listed(source: str) -> list[str]:
    path = Path(source.removeprefix(FILE))
    lines = path.read_text(errors="replace").splitlines()
    urls = [url for line in lines if (url := line.split("#")[0].strip())]
    for url in urls:
        if not _is_url(url):
            raise InvalidRequest(f"{path}: {url!r} is not http://HOST:PORT or https://HOST:PORT")
    return urls


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isascii()
    except ValueError:  # of the port
        return False
