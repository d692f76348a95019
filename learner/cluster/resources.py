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
class Needs:
    """What a rollout server, or the learner, asks for.

    Attributes:
        bundle: resources on one node.
        parts: how many bundles it takes: one for each worker of a server, which Ray places, or for each of the
            learner's nodes; 0: one, for all that it is.
    """

    bundle: Resources
    parts: int = 0

    @property
    def bundles(self) -> int:
        """How many it takes."""
        return self.parts or 1

    def __str__(self) -> str:
        return describe(self.bundle) if self.bundles == 1 else f"{self.bundles} x {describe(self.bundle)}"


def has_room(found: Sequence[Node], server: Needs, servers: int, learner: Needs, home: Node | None = None) -> bool:
    """Return whether servers and learner fit on the nodes with nothing else there.

    Args:
        home: the node of the learner, or of its first part; None: any.
    """
    fitting = {0: 0}  # most bundles of servers, by the number of the learner's bundles on the nodes so far
    for node in found:
        others, fitting = fitting, {}
        most = min(_times(learner.bundle, node.has), learner.bundles)
        for own in range(node == home, most + 1):
            left = {name: has - own * learner.bundle.get(name, 0.0) for name, has in node.has.items()}
            room = _times(server.bundle, left)
            for placed, before in others.items():
                fitting[placed + own] = max(fitting.get(placed + own, 0), before + room)
    return fitting.get(learner.bundles, -1) >= servers * server.bundles


def check_room(found: Sequence[Node], server: Needs, servers: int, learner: Needs) -> None:
    """Raise `invalid_request` where the cluster is too small, even with nothing else on it."""
    check_fits(found, server.bundle, "a server's worker" if server.parts else "a server")
    check_fits(found, learner.bundle, "a node of the learner" if learner.parts else "the learner")
    if not has_room(found, server, servers, learner):
        raise InvalidRequest(
            f"{servers} server{'s' * (servers > 1)} of {server} and a learner of {learner} do not "
            f"fit on this Ray cluster; it has {_list(found)}"
        )


def fewest_nodes(found: Sequence[Node], gpus: int) -> int | None:
    """Return the least number of nodes on which `gpus` can be had, as many on each; None if there is none."""
    counts = (count for count in range(1, gpus + 1) if gpus % count == 0)
    return next((n for n in counts if sum(_times({"GPU": gpus // n}, node.has) for node in found) >= n), None)


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
