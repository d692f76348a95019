"""Directory of the rollout servers on a Ray cluster: a named actor, to which each says where it can be reached.

It lives as long as the job that has made it. `ray:NAME` as a learner's rollout_url asks it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from learner.cluster.connection import NAMESPACE, answer, connect
from shared.errors import InvalidRequest, NotReady
from shared.messages import one_line

#: Of an actor's name, so that a user's own actors are none of ours.
_PREFIX = "directory:"


class Directory:
    """Where servers are, as an actor. A server has a place in the fleet, which is its name, whatever its address."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def announce(self, server: str, url: str, node_id: str) -> None:
        """List a server at `url`; what it was listed at before is forgotten."""
        with self._lock:
            self._places[server] = (url, node_id)

    def members(self) -> dict[str, str]:
        """Return the node id of each URL."""
        with self._lock:
            return dict(self._places.values())


def make_directory(ray: Any, name: str, node_id: str | None) -> Any:
    """Start a directory, which ends with this process's job, and return its actor.

    Args:
        node_id: of the node to live on, and no other: it is lost with its node; None: any.
    """
    options: dict[str, Any] = {"name": _PREFIX + name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 16}
    options["max_restarts"] = -1  # it begins empty then, and servers announce themselves again
    if node_id:
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
        options["scheduling_strategy"] = strategy
    return ray.remote(Directory).options(**options).remote()


def find_directory(ray: Any, name: str) -> Any:
    """Return the actor of a directory.

    Raises:
        InvalidRequest: there is none of that name.
        NotReady: Ray's control store does not answer.
    """
    try:
        try:
            return ray.get_actor(_PREFIX + name, namespace=NAMESPACE)
        except ValueError as error:
            missing = error
        actors = ray.util.list_named_actors(all_namespaces=True)
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise NotReady(f"the Ray cluster does not say where {name} is: {one_line(error)}") from error
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    known = sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))
    there = f"there are {', '.join(known)}" if known else "none is there"
    raise InvalidRequest(f"no servers called {name} on this Ray cluster: {there}") from missing


def members(name: str) -> Mapping[str, str]:
    """Return the node id of each server's URL that the directory `name` lists now.

    Raises:
        InvalidRequest: no Ray, no cluster ($RAY_ADDRESS), or no directory of that name.
        NotReady: the directory does not answer.
    """
    ray = connect()
    return answer(ray, find_directory(ray, name).members.remote(), f"the directory {name} of the Ray cluster")
