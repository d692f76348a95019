"""What a job asks of a cluster, and whether its nodes have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import InvalidRequest

Resources = Mapping[str, float]
#: Of the resource by which Ray knows a node, so that several may ask for it.
_ON_NODE = 0.001


@dataclass(frozen=True)
class Node:
    """A node of a cluster: what it has, in use or not."""

    node_id: str
    address: str
    has: Resources


def nodes(ray: Any) -> list[Node]:
    """Return the nodes that are alive."""
    return [Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]]


def home_of(ray: Any, found: Sequence[Node], asked: Resources) -> Node | None:
    """Return the node of this process, if it has what is asked; None for another, or no node at all."""
    own = ray.get_runtime_context().get_node_id()
    return next((node for node in found if node.node_id == own and _times(asked, node.has)), None)


def on_node(asked: Resources, node: Node) -> Resources:
    """Return what asks for `asked` on this node."""
    return {**asked, f"node:{node.address}": _ON_NODE}


@dataclass(frozen=True)
class ServerNeeds:
    """What a rollout server asks for.

    Attributes:
        bundle: resources on one node.
        workers: how many bundles it takes, one for each worker, which Ray places; 0: one, for all that the server is.
    """

    bundle: Resources
    workers: int = 0

    @property
    def bundles(self) -> int:
        """How many it takes."""
        return self.workers or 1

    def __str__(self) -> str:
        return describe(self.bundle) if self.bundles == 1 else f"{self.bundles} x {describe(self.bundle)}"


def has_room(
    found: Sequence[Node], server: ServerNeeds, servers: int, learner: Resources, home: Node | None = None
) -> bool:
    """Return whether servers and learner fit on the nodes with nothing else there.

    Args:
        home: the node of the learner; None: any.
    """
    for place in [home] if home else found:
        if _times(learner, place.has):
            left = {name: place.has.get(name, 0.0) - learner.get(name, 0.0) for name in place.has}
            elsewhere = sum(_times(server.bundle, node.has) for node in found if node is not place)
            if elsewhere + _times(server.bundle, left) >= servers * server.bundles:
                return True
    return False


def check_room(found: Sequence[Node], server: ServerNeeds, servers: int, learner: Resources) -> None:
    """Raise `invalid_request` where the cluster is too small, even with nothing else on it."""
    check_fits(found, server.bundle, "a server's worker" if server.workers else "a server")
    check_fits(found, learner, "the learner")
    if not has_room(found, server, servers, learner):
        raise InvalidRequest(
            f"{servers} server{'s' * (servers > 1)} of {server} and a learner of {describe(learner)} do not "
            f"fit on this Ray cluster; it has {_list(found)}"
        )


def fits(found: Sequence[Node], asked: Resources) -> bool:
    """Return whether some node has what is asked, with nothing else on it."""
    return any(_times(asked, node.has) for node in found)


def check_fits(found: Sequence[Node], asked: Resources, what: str) -> None:
    """Raise `invalid_request` where no node has what is asked, even with nothing else on it."""
    if not fits(found, asked):
        own = others(asked)
        raise InvalidRequest(
            f"{what} needs {describe(asked, *own)}, and no node of this Ray cluster has that; it has "
            f"{_list(found, *own)}"
        )


def describe(asked: Resources, *more: str) -> str:
    """Return resources in words: 2 GPUs and 1 CPU.

    Args:
        more: names of others that are said, too.
    """
    named = {name: asked[name] for name in ("GPU", "CPU", *more) if asked.get(name)}
    words = [f"{value:g} {name}{'s' * (value > 1 and name not in more)}" for name, value in named.items()]
    return " and ".join(words) or "no GPU and no CPU"


def others(asked: Resources) -> list[str]:
    """Return the names of resources that are neither cores nor GPUs: those that a cluster has defined for itself."""
    return [name for name in asked if name not in ("GPU", "CPU")]


def _list(found: Iterable[Node], *more: str) -> str:
    return ", ".join(f"{node.address} with {describe(node.has, *more)}" for node in found) or "no nodes"


def _times(asked: Resources, has: Resources) -> int:
    """Return how often a node has what is asked."""
    return min((int(has.get(name, 0.0) // value) for name, value in asked.items() if value), default=2**31)
