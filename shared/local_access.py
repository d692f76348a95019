"""Who may use a server that asks for no token: programs of its machine, but no page that a browser there has open.

A page of any site can make its browser send requests to this machine. It cannot choose what the browser says of them:
`Host` is the name that the page used, which may be its own name pointed at 127.0.0.1 (DNS rebinding), and `Origin` and
`Sec-Fetch-Site` tell where the page is from.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.bearer_tokens import is_loopback
from shared.errors import sendable

_AUTHORITY = re.compile(r"(\[[^\]]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")
_OWN_SITE = ("same-origin", "none")  # `none`: the user typed the address


@dataclass(frozen=True)
class LocalAccess:
    """The rules of one server.

    Attributes:
        bound: the address or name that it listens on; None and "" are every interface.
        names: other names of it, in lower case.
    """

    bound: str | None = "127.0.0.1"
    names: frozenset[str] = frozenset()

    def refusal(
        self, hosts: Sequence[str], origins: Sequence[str], sites: Sequence[str], trusted: Collection[str] = ()
    ) -> str | None:
        """Return why a request may not pass; None if it may.

        Args:
            hosts, origins, sites: the values of its headers Host, Origin and Sec-Fetch-Site.
            trusted: other origins whose pages may send it; "*" is every one.
        """
        if len(hosts) != 1 or not self._is_own_name(hosts[0]):
            return f"a server without tokens does not answer to the Host {_shown(hosts)}"
        host = hosts[0].lower()
        if len(origins) <= 1 and ("*" in trusted or any(origin in trusted for origin in origins)):
            return None
        if len(origins) > 1 or any(origin.lower() not in (f"http://{host}", f"https://{host}") for origin in origins):
            return f"a server without tokens takes nothing from pages of the Origin {_shown(origins)}"
        if any(site not in _OWN_SITE for site in sites):
            return f"a server without tokens takes nothing from pages of other sites (Sec-Fetch-Site: {_shown(sites)})"
        return None

    def _is_own_name(self, authority: str) -> bool:
        """Return whether no page can have made up this name. A page's own name always has a dot."""
        matched = _AUTHORITY.fullmatch(authority)
        if matched is None:
            return False
        name = matched[1].strip("[]").lower()
        if name.removesuffix(".") in self.names:
            return True
        if is_loopback(self.bound):
            return is_loopback(name)
        return "." not in name or name == (self.bound or "").lower() or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(values: Sequence[str]) -> str:
    return sendable(", ".join(values)[:200]) or "(none)"
