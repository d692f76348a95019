"""Requests that a page of another site makes a browser send to a server on the loopback that has no token."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.blobs import put_together, take_apart
from tests.fuzz.campaign import Target, every, json_bytes
from tests.integration.support import policy as P

#: What gives such a request away -> its headers.
FOREIGN: dict[str, dict[str, str]] = {
    "a rebound name": {"host": "evil.example"},
    "a rebound name with a port": {"host": "evil.example:8000"},
    "a name that begins with localhost": {"host": "localhost.evil.example"},
    "a name that begins with an address": {"host": "127.0.0.1.evil.example"},
    "a name that ends with localhost": {"host": "evil-localhost"},
    "another address": {"host": "10.1.2.3"},
    "an address of the Internet": {"host": "93.184.216.34:8000"},
    "an origin": {"origin": "http://evil.example"},
    "an origin with TLS": {"origin": "https://evil.example:8443"},
    "an origin that begins with localhost": {"origin": "http://localhost.evil.example"},
    "an origin that begins with an address": {"origin": "http://127.0.0.1.evil.example"},
    "no origin": {"origin": "null"},
    "a cross-site fetch": {"sec-fetch-site": "cross-site"},
    "a cross-site form": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "content-type": "text/plain"},
    "a cross-site navigation": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
}
#: Sent last, and only if the server refuses the others: it would end the server, or its run.
_ENDS = [("DELETE", "/v1/runs/fuzzed"), ("POST", "/v1/drain")]
_PREFLIGHTS = [("PUT", "/v1/runs/fuzzed/adapter"), ("POST", "/v1/drain"), ("POST", "/v1/chat/completions")]


def _requests(blob: bytes) -> dict[tuple[str, str], bytes]:
    """Return what a server without token takes from its own user: method and path -> body."""
    chat = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    return {
        ("GET", "/v1/state"): b"",
        ("GET", "/v1/models"): b"",
        ("GET", "/metrics"): b"",
        ("GET", "/openapi.json"): b"",
        ("GET", "/v1/runs/fuzzed"): b"",
        ("POST", "/v1/generate"): json_bytes({"prompts": [{"text": "a"}], "run_id": "fuzzed"}),
        ("POST", "/v1/score"): json_bytes({"sequences": [[5, 6]], "policy": "base"}),
        ("POST", "/v1/completions"): json_bytes({"model": "base", "prompt": "a", "max_tokens": 2}),
        ("POST", "/v1/chat/completions"): json_bytes(chat),
        ("POST", "/tokenize"): json_bytes({"model": "base", "prompt": "a"}),
        ("PUT", "/v1/runs/fuzzed/adapter"): blob,  # of the served version: taken, it changes nothing
    }


def fuzz_foreign(target: Target, good: bytes, examples: int, number: int) -> None:
    """Send everything that a page could, and check that nothing is answered; and that the user still is."""
    document, manifest, data = take_apart(good)
    version = target.served_version("fuzzed")[0]
    known = _requests(put_together(document, manifest | {"version": version.model_dump()}, bytes(data)))
    taken = set[str]()

    def send(drawn: tuple[str, tuple[str, str]]) -> None:
        kind, (method, path) = drawn
        headers = {"content-type": "application/json", "lockstep-lease": P.LEASE} | FOREIGN[kind]
        content = known.get((method, path), b"")
        answer = target.send("foreign", method, path, what=kind, content=content, headers=headers)
        if answer is not None and not 400 <= answer.status_code < 500:
            taken.add(kind)
            about = {"method": method, "path": path, "status": answer.status_code}
            target.tally.fail(f"foreign: {kind} is no reason to refuse an answer to {about}")

    every(st.tuples(st.sampled_from(list(FOREIGN)), st.sampled_from(list(known))), examples, number, send)
    for kind in FOREIGN:
        for asked in known:
            send((kind, asked))
    for kind in FOREIGN.keys() - taken:
        for asked in _ENDS:
            send((kind, asked))
    for method, path in _PREFLIGHTS:
        _preflight(target, method, path)
    for host in _own_hosts(target):
        answer = target.send("foreign", "GET", "/v1/state", what=f"our own {host}", headers=host)
        if answer is not None and answer.status_code != 200:
            target.tally.fail(f"foreign: {host} is refused, with {answer.status_code}")
    target.expect_unchanged("requests of other sites")


def _preflight(target: Target, method: str, path: str) -> None:
    headers = {
        "origin": "http://evil.example",
        "access-control-request-method": method,
        "access-control-request-headers": "lockstep-lease",
    }
    answer = target.send("foreign", "OPTIONS", path, what="a preflight", headers=headers)
    allowed: Any = answer.headers.get("access-control-allow-origin") if answer is not None else None
    if allowed:
        target.tally.fail(f"foreign: the preflight of {method} {path} is allowed to {allowed}")


def _own_hosts(target: Target) -> list[dict[str, str]]:
    port = target.http.base_url.port
    names = [f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LOCALHOST:{port}", "localhost", "127.0.0.1"]
    own = f"http://127.0.0.1:{port}"
    return [*({"host": name} for name in names), {"origin": own}, {"sec-fetch-site": "same-origin"}]
