"""Pushes that must leave everything as it was, whoever sends them: what is served, who owns it, and the next push."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
from hypothesis import strategies as st

from tests.fuzz.blobs import Parts, digest_of, put_together, take_apart
from tests.fuzz.campaign import Target, every
from tests.fuzz.connections import address_of
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP

_STRANGER = "a stranger's lease"
#: Names longer than any buffer that something might have for them.
_LONG = [200, 5_000, 70_000, 300_000, 2**20]
_IN_FLIGHT = ["drain", "keep", "carried"]
_JOINS_LEAVE_S = 20.0


class Owner:
    """The learner of the run `fuzzed`.

    Args:
        good: a valid blob of the run.
    """

    def __init__(self, target: Target, good: bytes) -> None:
        self.target, self._good = target, take_apart(good)
        self.served = target.served_version("fuzzed")

    def parts(self, steps: int = 1) -> Parts:
        """Return a valid blob, in parts, that many steps after the one that is served."""
        document, manifest, data = copy.deepcopy(self._good)
        version = self.served[0]
        manifest["version"] = {"run_id": "fuzzed", "fence": version.fence, "step": version.step + steps}
        return document, manifest, data

    def put(self, blob: bytes, what: str, lease: str = P.LEASE, **headers: str) -> httpx.Response | None:
        """Push a blob; `headers` in Python's spelling."""
        sent = {"Lockstep-Lease": lease, **{f"Lockstep-{n.replace('_', '-')}": value for n, value in headers.items()}}
        return self.target.send("pushes", "PUT", "/v1/runs/fuzzed/adapter", what=what, content=blob, headers=sent)

    def push(self, after: str) -> None:
        """Push the next version; a server that says it is ready must take it."""
        ready = self.target.http.get("/ready").status_code == 200
        answer = self.put(put_together(*self.parts()), f"a good push after {after}")
        if ready and (answer is None or answer.status_code != 200):
            text = answer.text[:300] if answer else "no answer"
            self.target.tally.fail(f"pushes: /ready is 200, and a good push fails after {after}: {text}")
        self.served = self.target.served_version("fuzzed")

    def refused(self, blob: bytes, what: str, lease: str = P.LEASE, **headers: str) -> None:
        """Push what must be refused, and check that it has changed nothing that the owner has."""
        fail = self.target.tally.fail
        answer = self.put(blob, what, lease, **headers)
        if answer is not None and answer.status_code < 400:
            fail(f"pushes: {what} is accepted")
            self.served = self.target.served_version("fuzzed")
            return
        now = self.target.http.get("/v1/runs/fuzzed")
        if now.status_code != 200 or self.target.served_version("fuzzed") != self.served:
            fail(f"pushes: {what} was refused, and what is served has changed: {now.text[:300]}, was {self.served}")
        repeated = self.put(put_together(*self.parts(0)), f"the owner's after {what}")
        if repeated is not None and repeated.status_code != 200:
            fail(f"pushes: {what} was refused, and the owner's push is too: {repeated.text[:300]}")
            self.put(put_together(*self.parts(0)), "the owner takes it back", takeover="1")
        strange = self.put(put_together(*self.parts(0)), f"a stranger's after {what}", _STRANGER)
        if strange is not None and strange.status_code != 403:
            fail(f"pushes: after {what} a stranger holds the run: {strange.status_code}")


def _truncated(parts: Parts, share: float) -> bytes:
    blob = put_together(*parts[:2], bytes(parts[2]))
    return blob[: max(int(len(blob) * share), 1)]


def _of_manifest(**changes: Any) -> Callable[[Parts, float], bytes]:
    return lambda parts, share: put_together(parts[0], {**parts[1], **changes}, bytes(parts[2]))


def _not_finite(parts: Parts, share: float) -> bytes:
    document, manifest, data = parts
    place = 4 * int(share * (len(data) // 4 - 1))
    data[place : place + 4] = np.float32(np.nan).tobytes()
    return put_together(document, {**manifest, "checksum": digest_of(document, data)}, bytes(data))


def _flipped(parts: Parts, share: float) -> bytes:
    parts[2][int(share * (len(parts[2]) - 1))] ^= 1
    return put_together(*parts[:2], bytes(parts[2]))


def _renamed(length: int, letter: str = "m") -> Callable[[Parts, float], bytes]:
    """Return a maker of blobs one of whose modules has a name of that length."""

    def make(parts: Parts, share: float) -> bytes:
        document, manifest, data = parts
        old, new = sorted(manifest["modules"])[0], letter * length
        manifest["modules"][new] = manifest["modules"].pop(old)
        for suffix in (".lora_A.weight", ".lora_B.weight"):
            document[new + suffix] = document.pop(old + suffix)
        with contextlib.suppress(Exception):
            manifest["checksum"] = digest_of(document, data)
        return put_together(document, manifest, bytes(data))

    return make


def _many_renamed(length: int) -> Callable[[Parts, float], bytes]:
    def make(parts: Parts, share: float) -> bytes:
        document, manifest, data = parts
        for number, old in enumerate(sorted(manifest["modules"])):
            new = f"{number}" + "m" * length
            manifest["modules"][new] = manifest["modules"].pop(old)
            for suffix in (".lora_A.weight", ".lora_B.weight"):
                document[new + suffix] = document.pop(old + suffix)
        return put_together(document, manifest, bytes(data))

    return make


#: Name of a push that must be refused -> its bytes, from those of a valid one of the next version.
_BAD: dict[str, Callable[[Parts, float], bytes]] = {
    "a wrong checksum": _of_manifest(checksum="0" * 32),
    "a flipped bit": _flipped,
    "a truncated body": _truncated,
    "not a number": _not_finite,
    "another base": _of_manifest(base_weights="ab" * 16),
    "another run": _of_manifest(version={"run_id": "kept", "fence": 0, "step": 10**6}),
    "another dtype": _of_manifest(dtype="bfloat16"),
    "an old version": _of_manifest(version={"run_id": "fuzzed", "fence": 0, "step": 0}, checksum="1" * 32),
    "a step of 400 digits": _of_manifest(version={"run_id": "fuzzed", "fence": 0, "step": 10**400}),
    "a fence of 400 digits": _of_manifest(version={"run_id": "fuzzed", "fence": 10**400, "step": 0}),
    "a step beyond 64 bits": _of_manifest(version={"run_id": "fuzzed", "fence": 0, "step": 2**64}),
    **{f"a module's name of {length}": _renamed(length) for length in _LONG},
    **{
        f"a module's name of 70,000 {letter!r}": _renamed(70_000, letter)
        for letter in ("\U0001f600", "\x01", '"', "\u2028")
    },
    **{f"modules' names of {length}": _many_renamed(length) for length in (5_000, 70_000, 300_000)},
    **{f"a run's name of {length}": _of_manifest(version={"run_id": "r" * length, "step": 1}) for length in _LONG},
    **{f"a checksum of {length}": _of_manifest(checksum="0" * length) for length in _LONG},
    **{f"a base's name of {length}": _of_manifest(base_weights="b" * length) for length in _LONG},
    **{f"a dtype of {length}": _of_manifest(dtype="d" * length) for length in _LONG},
    **{f"a field's name of {length}": _of_manifest(**{"f" * length: 1}) for length in _LONG},
}
#: How a push presents itself: its lease, and its other headers.
_AS: dict[str, tuple[str, dict[str, str]]] = {
    "the owner": (P.LEASE, {}),
    "a takeover": (_STRANGER, {"takeover": "1"}),
    "a takeover that keeps": (_STRANGER, {"takeover": "true", "in_flight": "keep"}),
}


def fuzz_pushes(target: Target, good: bytes, examples: int, number: int) -> None:
    """Send refused takeovers, and pushes with long names; then the same push several times at once."""
    owner = Owner(target, good)
    owner.push("nothing")

    def send(drawn: tuple[str, str, float]) -> None:
        bad, who, share = drawn
        lease, headers = _AS[who]
        owner.refused(_BAD[bad](owner.parts(), share), f"{bad}, from {who}", lease, **headers)
        owner.push(f"{bad}, from {who}")

    presented = list(itertools.product(_BAD, ("the owner", "a takeover")))
    if examples == 1:  # of each one or the other, in turn
        presented = presented[::4] + presented[3::4]
    for bad, who in presented:
        send((bad, who, 0.5))
    strategy = st.tuples(st.sampled_from(list(_BAD)), st.sampled_from(list(_AS)), st.floats(0, 0.99))
    every(strategy, examples, number, send)
    _long_addresses(target)
    for in_flight in _IN_FLIGHT * 2:
        _at_once(owner, in_flight)
    owner.push("all pushes")
    target.served["runs"]["fuzzed"] = owner.served
    target.expect_unchanged("pushes")


def _long_addresses(target: Target) -> None:
    """Name runs, leases and models of all lengths, in paths, headers and bodies."""
    for length in _LONG:
        name = "r" * length
        for method, path in (("GET", ""), ("PUT", "/adapter"), ("POST", "/group"), ("DELETE", "")):
            headers = {"Lockstep-Lease": P.LEASE}
            target.send("pushes", method, f"/v1/runs/{name}{path}", what=f"a path of {length}", headers=headers)
        for model in (name, f"policy:{name}"):
            body = {"model": model, "prompt": "a", "max_tokens": 2}
            target.send("pushes", "POST", "/v1/completions", what=f"a model's name of {length}", json=body)
        body = {"prompts": [{"text": "a"}], "run_id": name}
        target.send("pushes", "POST", "/v1/generate", what=f"a run's name of {length}", json=body)
        headers = {"Lockstep-Lease": name}
        target.send(
            "pushes", "PUT", "/v1/runs/fuzzed/adapter", what=f"a lease of {length}", content=b"", headers=headers
        )


def _at_once(owner: Owner, in_flight: str) -> None:
    """Push the same version several times while requests run, as a learner does whose connection has been cut."""
    target, blob = owner.target, put_together(*owner.parts())
    body = {
        "prompts": [{"token_ids": [5 + i]} for i in range(8)],
        "run_id": "fuzzed",
        "sampling": {"max_tokens": 200, "n": 2, "ignore_eos": True},
    }
    what = f"the same push at once, in flight {in_flight}"
    target.during = f"pushes: {what}"

    def push(delay_s: float) -> httpx.Response:
        time.sleep(delay_s)
        headers = {"Lockstep-Lease": P.LEASE, "Lockstep-In-Flight": in_flight}
        return HTTP.put(f"{target.url}/v1/runs/fuzzed/adapter", content=blob, headers=headers, timeout=30.0)

    with ThreadPoolExecutor(18) as pool:
        running = [pool.submit(HTTP.post, f"{target.url}/v1/generate", json=body, timeout=60.0) for _ in range(2)]
        time.sleep(0.3)
        pushing = [pool.submit(push, delay_s) for delay_s in (i * 0.015 for i in range(16))]
        for future in (*running, *pushing):
            try:
                answer = future.result()
            except httpx.HTTPError as error:
                target.tally.fail(f"pushes: {what}: no answer: {error!r}")
                continue
            target.judge(
                "pushes", answer.request.method, answer.request.url.path, answer.status_code, answer.text, 0, what
            )
            if answer.status_code != 200:
                target.tally.fail(f"pushes: {what}: {answer.status_code} {answer.text[:300]}")
    owner.served = target.served_version("fuzzed")


def fuzz_joins(target: Target, processes: Callable[[], list[int]], examples: int) -> None:
    """Begin to join a run's collective group and do not come; nothing of it may be left on the server."""
    ways: dict[str, Callable[[dict[str, Any]], None]] = {
        "nobody comes": lambda invitation: None,
        "it is hung up on": lambda invitation: None,
        "its port is touched": lambda invitation: _write(target, invitation, b""),
        "noise comes": lambda invitation: _write(target, invitation, b"\xff" * 100_000),
        "a request comes": lambda invitation: _write(target, invitation, b"GET / HTTP/1.1\r\n\r\n"),
    }
    _fail_to_join(target, lambda invitation: None, waits=True)  # what is made once is made now
    times = max(examples // len(ways), 2)
    for way, come in ways.items():
        target.during = f"joins: {way}"
        before = _descriptors(processes())
        for _ in range(times):
            _fail_to_join(target, come, waits=way != "it is hung up on")
        deadline = time.monotonic() + _JOINS_LEAVE_S
        while (left := _descriptors(processes()) - before) >= times and time.monotonic() < deadline:
            time.sleep(0.5)
        if left >= times:
            target.tally.fail(f"joins: {way}, {times} times: {left} descriptors and threads are left")
    target.expect_unchanged("joins")


def _fail_to_join(target: Target, come: Callable[[dict[str, Any]], None], *, waits: bool) -> None:
    """Ask for an invitation, and `come`; then wait until the server gives up, and check that nobody listens there."""
    headers, invitation = {"Lockstep-Lease": P.LEASE}, None
    with target.http.stream("POST", "/v1/runs/fuzzed/group", headers=headers) as answer:
        target.tally.statuses.setdefault("joins", Counter())[answer.status_code] += 1
        if answer.status_code != 200:
            target.tally.fail(f"joins: no invitation: {answer.read()[:300]!r}")
            return
        for line in answer.iter_lines():
            if invitation is None:
                invitation = json.loads(line)
                come(invitation)
                if not waits:
                    break
    assert invitation is not None
    deadline = time.monotonic() + _JOINS_LEAVE_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address_of(target.url)[0], invitation["port"]), timeout=1.0).close()
        except OSError:
            return
        time.sleep(0.3)
    target.tally.fail(f"joins: the group's port is still open {_JOINS_LEAVE_S:.0f} s after a join that failed")


def _write(target: Target, invitation: dict[str, Any], data: bytes) -> None:
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address_of(target.url)[0], invitation["port"]), timeout=1.0) as stranger,
    ):
        stranger.sendall(data)


def _descriptors(pids: list[int]) -> int:
    """Return how many descriptors and threads some processes have."""
    return sum(process.num_fds() + process.num_threads() for process in map(psutil.Process, pids))
