"""Where the rollout servers are: fixed URLs, a DNS name with several addresses, or a file; the last two may change."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from shared.errors import InvalidRequest, LockstepError

DNS = "dns+"
FILE = "file:"


class ServerDiscovery:
    """URLs of the rollout servers, as they are now.

    Args:
        given: `http(s)://HOST:PORT`; `dns+http://NAME:PORT` for every address that the name has (a headless service);
            `file:PATH` for a file with one URL a line, `#` for comments.

    Raises:
        LockstepError: `invalid_request` for anything else, or nothing.
    """

    def __init__(self, given: Sequence[str]) -> None:
        for place in given:
            _check(place)
        if not given:
            raise InvalidRequest("give --rollout_url, e.g. http://127.0.0.1:8000")
        self._given = list(given)
        self._last: dict[str, list[str]] = {}
        self._complaints: dict[str, str] = {}

    @property
    def may_change(self) -> bool:
        """Whether asking again may answer something else."""
        return any(place.startswith((DNS, FILE)) for place in self._given)

    def urls(self) -> list[str]:
        """All URLs, each once. A name or file that cannot be read now keeps what it said last."""
        return list(dict.fromkeys(url.rstrip("/") for place in self._given for url in self._resolve(place)))

    def _resolve(self, place: str) -> list[str]:
        try:
            if place.startswith(DNS):
                found = _addresses(place.removeprefix(DNS))
            elif place.startswith(FILE):
                found = _listed(Path(place.removeprefix(FILE)))
            else:
                return [place]
            self._last[place] = found or self._last.get(place, [])  # it may be about to be written
        except (OSError, LockstepError) as error:
            self._complain(place, str(error))
        return self._last.get(place, [])

    def _complain(self, place: str, why: str) -> None:
        """Once for each reason."""
        if self._complaints.get(place) != why:
            self._complaints[place] = why
            warnings.warn(f"rollout_url {place}: {why}; the servers stay as they were", stacklevel=2)


def _check(place: str) -> None:
    if place.startswith(FILE):
        try:
            _listed(Path(place.removeprefix(FILE)))
        except OSError as error:
            raise InvalidRequest(f"rollout_url {place!r}: {error}") from error
        return
    if not _is_url(place.removeprefix(DNS)):
        raise InvalidRequest(
            f"rollout_url {place!r} must start with http:// or https://, be dns+http://NAME:PORT for all addresses of "
            "a name, or file:PATH for a file with one URL a line"
        )
    if place.startswith(DNS + "https:"):
        raise InvalidRequest(
            f"rollout_url {place!r}: a certificate is for a name, not for the addresses behind it; list the servers' "
            "own names in a file (file:PATH)"
        )


def _addresses(url: str) -> list[str]:
    parts = urlsplit(url)
    port = parts.port or 80
    found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
    return [
        f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}" for host in sorted(map(str, found))
    ]


def _listed(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text(errors="replace").splitlines())
    urls = [line for line in lines if line]
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
