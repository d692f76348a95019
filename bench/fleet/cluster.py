"""A Ray cluster of several nodes on this machine, with a directory of servers that are said to be on them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

from learner.cluster.connection import ADDRESS_VARIABLE, answer, connect, import_ray
from learner.cluster.directory import make_directory

NAME = "simulated"
STORE_BYTES = 200 * 2**20


@contextlib.contextmanager
def cluster_of(nodes: int, urls: Sequence[str]) -> Iterator[None]:
    """Run a cluster whose directory `NAME` lists `urls`, spread over its nodes; this process is connected to it."""
    os.environ.update({"RAY_DISABLE_MEMORY_MONITOR": "1", "RAY_USAGE_STATS_ENABLED": "0"})
    import_ray()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    before = os.environ.get(ADDRESS_VARIABLE)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**{**node, "include_dashboard": None})
        os.environ[ADDRESS_VARIABLE] = cluster.address
        ray = connect()
        ids = sorted(each["NodeID"] for each in ray.nodes() if each["Alive"])
        directory = make_directory(ray, NAME, None)
        for i, (url, node_id) in enumerate(zip(urls, itertools.cycle(ids), strict=False)):
            answer(ray, directory.announce.remote(str(i), url, node_id), "the directory", 120.0)
        yield
    finally:
        os.environ.pop(ADDRESS_VARIABLE, None)
        if before is not None:
            os.environ[ADDRESS_VARIABLE] = before
        with contextlib.suppress(Exception):
            import_ray().shutdown()
        cluster.shutdown()
