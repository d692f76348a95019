"""A Ray cluster of several nodes on this machine, with a directory of servers that are said to be on them."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from learner.cluster.connection import ADDRESS_VARIABLE, answer, connect, import_ray
from learner.cluster.directory import make_directory
from learner.utils.environment import variables_set

NAME = "simulated"
STORE_BYTES = 200 * 2**20
_ATTEMPTS = 5


def _patiently(start: Callable[[], object]) -> None:
    """Start a node; again, where it was not there within the 30 s that Ray gives it: this machine may be busy."""
    for attempt in range(_ATTEMPTS):
        try:
            start()
            return
        except Exception:
            if attempt == _ATTEMPTS - 1:
                raise


@contextlib.contextmanager
def cluster_of(nodes: int, urls: Sequence[str]) -> Iterator[None]:
    """Run a cluster whose directory `NAME` lists `urls`, spread over its nodes; this process is connected to it."""
    with contextlib.ExitStack() as stack:
        # Of its own, or `ray.init` of others on this machine would find this cluster.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        stack.enter_context(
            variables_set({"RAY_DISABLE_MEMORY_MONITOR": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder})
        )
        import_ray()
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        cluster = Cluster()
        stack.callback(cluster.shutdown)
        for i in range(nodes):
            _patiently(partial(cluster.add_node, **node, **({} if i else {"include_dashboard": False})))
        stack.enter_context(variables_set({ADDRESS_VARIABLE: cluster.address}))
        ray = connect()
        stack.callback(ray.shutdown)
        ids = sorted(each["NodeID"] for each in ray.nodes() if each["Alive"])
        directory = make_directory(ray, NAME, None)
        for i, (url, node_id) in enumerate(zip(urls, itertools.cycle(ids), strict=False)):
            answer(ray, directory.announce.remote(str(i), url, node_id), "the directory", 120.0)
        yield
