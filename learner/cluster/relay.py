"""Relays of a body that goes to many servers: it enters Ray's object store once, and each node's relay sends it on.

Nodes take it from one another, as Ray moves objects. A relay is an actor on a node with servers; it sends ready-made
requests, bearer tokens included, which come with every call and are kept nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from learner.cluster.connection import answer, connect
from learner.cluster.directory import find_directory
from shared.errors import LockstepError, NotReady, Timeout
from shared.messages import one_line

logger = logging.getLogger("lockstep.cluster")

#: Requests that a relay makes at the same time.
_AT_ONCE = 16
_SLICE_BYTES = 2**20
#: A connection outlasts a step of some seconds; servers end idle ones after 75 s.
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=45.0)
#: The start of a relay's process, and the way of the object to its node, beyond the deadline of a request.
_START_S = 60.0
_GATEWAY_TIMEOUT = 504
_REST_S, _LONGEST_REST_S = 15.0, 900.0


class Request(NamedTuple):
    """A PUT whose body is to be relayed."""

    url: str
    headers: dict[str, str]


class Response(NamedTuple):
    """What a server has answered."""

    status: int
    content: bytes


class Relay:
    """Sends a body from its node's object store to servers there; an actor.

    Args:
        ca: certificate of the CA of the servers, in PEM; None: the well-known CAs of its node.
    """

    def __init__(self, ca: str | None) -> None:
        verify = ssl.create_default_context(cadata=ca) if ca else httpx.create_ssl_context()
        self._http = httpx.Client(transport=httpx.HTTPTransport(retries=2, verify=verify, limits=_LIMITS))
        self._threads = ThreadPoolExecutor(_AT_ONCE)

    def put(
        self, pieces: Sequence[Any], requests: Sequence[tuple[str, dict[str, str]]], timeout_s: float
    ) -> list[tuple[int, bytes] | str]:
        """Make all requests; return the status and content of each response, or why there is none."""
        parts = [memoryview(piece) for piece in pieces]

        def one(request: tuple[str, dict[str, str]]) -> tuple[int, bytes] | str:
            url, headers = request
            slices: Any = (part[i : i + _SLICE_BYTES] for part in parts for i in range(0, len(part), _SLICE_BYTES))
            try:
                response = self._http.put(url, content=slices, headers=headers, timeout=timeout_s)
            except httpx.TimeoutException as error:  # it hangs: a direct request would, too
                late = Timeout(f"{url} has not answered a relay within {timeout_s:g} s ({one_line(error)})")
                return _GATEWAY_TIMEOUT, late.body().model_dump_json().encode()
            except httpx.HTTPError as error:
                return one_line(error)
            return response.status_code, response.content

        return list(self._threads.map(one, requests))


class Relays:
    """The relays of a fleet, started where they are first needed; they end with this process.

    Args:
        name: of the fleet's directory.
        ca_file: CA of the servers' certificates, in PEM.
    """

    def __init__(self, name: str, ca_file: str | None = None) -> None:
        self._name, self._ca_file = name, ca_file
        self._nodes: dict[str, str] = {}
        self._actors: dict[str, Any] = {}
        #: Of nodes whose relay has not answered: when it is tried again, and how long it is left alone then.
        self._resting: dict[str, tuple[float, float]] = {}
        self._problem = ""
        self._lock = threading.Lock()

    def put(self, pieces: Sequence[Any], requests: Mapping[str, Request], timeout_s: float) -> dict[str, Response]:
        """Send one body with each of `requests`, by the URL of their servers.

        Args:
            pieces: of the body, in order.
            timeout_s: for a server to answer.

        Returns:
            The responses. A server that the directory does not list, or that its relay did not reach, has none: say
            it is sent to directly; why is logged once.
        """
        with self._lock:
            try:
                return self._put(pieces, requests, timeout_s)
            except Exception as error:  # of Ray, of any kind
                self._say(error.message if isinstance(error, LockstepError) else one_line(error))
                return {}

    def _put(self, pieces: Sequence[Any], requests: Mapping[str, Request], timeout_s: float) -> dict[str, Response]:
        ray = connect()
        if not requests.keys() <= self._nodes.keys():
            listed = answer(ray, find_directory(ray, self._name).members.remote(), f"the directory {self._name}")
            self._nodes = {url.rstrip("/"): node for url, node in listed.items()}
        by_node: dict[str, list[str]] = {}
        for url in requests:
            if (node := self._nodes.get(url)) and time.monotonic() >= self._resting.get(node, (0.0, 0.0))[0]:
                by_node.setdefault(node, []).append(url)
        body = ray.put([np.frombuffer(piece, np.uint8) for piece in pieces])
        asked = {}
        for node, urls in by_node.items():
            relay = self._actors.get(node) or self._start(ray, node)
            asked[node] = relay.put.remote(body, [tuple(requests[url]) for url in urls], timeout_s)
        responses: dict[str, Response] = {}
        deadline = time.monotonic() + timeout_s + _START_S
        for node, reference in asked.items():
            try:
                what = f"the relay on node {node[:12]}"
                outcomes = answer(ray, reference, what, max(0.0, deadline - time.monotonic()))
            except NotReady as error:
                self._give_up(ray, node, late=time.monotonic() >= deadline)
                self._say(error.message)
                continue
            self._resting.pop(node, None)
            for url, outcome in zip(by_node[node], outcomes, strict=True):
                if isinstance(outcome, str):
                    self._say(f"the relay on node {node[:12]} does not reach {url}: {outcome}")
                else:
                    responses[url] = Response(*outcome)
        return responses

    def _give_up(self, ray: Any, node: str, *, late: bool) -> None:
        """End a relay that is gone or late; after a late one leave its node alone: every push would wait for it."""
        with contextlib.suppress(Exception):  # it may be gone
            ray.kill(self._actors[node])
        del self._actors[node]
        if late:
            pause = min(2 * self._resting.get(node, (0.0, _REST_S / 2))[1], _LONGEST_REST_S)
            self._resting[node] = (time.monotonic() + pause, pause)
        self._nodes = {}  # its servers may have moved

    def _start(self, ray: Any, node: str) -> Any:
        ca = Path(self._ca_file).read_text() if self._ca_file else None
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": strategy}
        self._actors[node] = ray.remote(Relay).options(**options).remote(ca)
        return self._actors[node]

    def _say(self, problem: str) -> None:
        if not self._problem:
            logger.warning("pushes go directly to servers that no relay reaches (said once): %s", problem)
        self._problem = problem
