"""Simulated rollout servers, hundreds in one process: the real protocol over HTTP on loopback, and no engine.

python -m bench.fleet.simulated --servers 100 --tokens 128 --decode-s 2        # prints a URL a line, then serves

Each has a port and an epoch of its own, verifies the checksum of what it is sent, and answers prompts with made-up
tokens of the version that it serves, after about the seconds that decoding takes. Where $LOCKSTEP_TOKEN is set,
requests must bear it. The process ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import secrets
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import uvicorn
import xxhash

from shared import wire
from shared.adapter_file import header_length, parse_header
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import ChecksumMismatch, LeaseMismatch, LockstepError, StaleVersion, Unauthenticated, UnknownRun
from shared.rollouts import HEARTBEAT_SECONDS, VersionSpan
from shared.weights import AdapterManifest, BaseFingerprint, PushReceipt, RunState, ServerState, WeightVersion

Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

_manifests: dict[bytes, AdapterManifest] = {}


class SimulatedServer:
    """One server: its epoch, and the run that it serves.

    Args:
        tokens: of each completion.
        decode_s: until the last group of a request has finished; the others finish before, evenly.
        token: that requests must bear; None: any.
    """

    def __init__(self, tokens: int, decode_s: float, token: str | None = None) -> None:
        self.tokens, self.decode_s, self.token = tokens, decode_s, token
        self.epoch = secrets.token_hex(8)
        self.served: AdapterManifest | None = None
        self.lease = ""
        self.installs = self.pushes = self.bytes = 0

    def state(self) -> ServerState:
        """Return the state as `GET /v1/state` does."""
        unknown = BaseFingerprint(weights=None, tokenizer=None, chat_template=None)
        return ServerState(
            epoch=self.epoch,
            ready=True,
            model="simulated",
            base=unknown,
            vllm_version="none",
            device="cpu",
            dtype="bfloat16",
            lora_dtype="bfloat16",
            max_model_len=8192,
            max_lora_rank=64,
            slots_per_run=2,
            max_runs=1,
            workers=1,
            logprobs_mode="processed_logprobs",
            runs=[self.run()] if self.served else [],
        )

    def run(self) -> RunState:
        """Return the state of the run that is served."""
        if self.served is None:
            raise UnknownRun("no such run")
        return RunState(
            run_id=self.served.version.run_id,
            version=self.served.version,
            checksum=self.served.checksum,
            install_seq=self.installs,
            slots=[],
            running_requests=0,
        )

    def install(self, body: bytes, lease: str) -> PushReceipt:
        """Serve what was pushed, and return the receipt.

        Raises:
            LockstepError: it did not arrive intact, is older than what is served, or of another learner.
        """
        self.pushes += 1
        self.bytes += len(body)
        manifest = _verified(body)
        if self.served and lease != self.lease:
            raise LeaseMismatch("another learner holds the run")
        if self.served and manifest.version < self.served.version:
            raise StaleVersion(f"{manifest.version} is not after {self.served.version}")
        repeated = self.served is not None and self.served.version == manifest.version
        self.installs += not repeated
        self.served, self.lease = manifest, lease
        return PushReceipt(
            epoch=self.epoch,
            version=manifest.version,
            install_seq=self.installs,
            checksum=manifest.checksum,
            bytes=len(body),
            workers=1,
            modules=len(manifest.modules),
            transfer_seconds=0.0,
            install_seconds=0.0,
            flip_seconds=0.0,
            wait_seconds=0.0,
            repeated=repeated,
        )

    async def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes, send: Send) -> None:
        """Answer one request."""
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            raise Unauthenticated("no such token")
        if path in (wire.READY, wire.HEALTH):
            await _respond(send, 200, b"")
        elif path == wire.STATE:
            await _respond(send, 200, self.state().model_dump_json().encode())
        elif method == "PUT":
            receipt = self.install(body, headers.get(wire.LEASE_HEADER.lower(), ""))
            await _respond(send, 200, receipt.model_dump_json().encode())
        elif path == wire.GENERATE:
            await self._generate(json.loads(body), send)
        elif method == "DELETE":
            self.run()
            self.served = None
            await _respond(send, 200, b"{}")
        else:
            await _respond(send, 404, b"")

    async def _generate(self, asked: Mapping[str, Any], send: Send) -> None:
        version, prompts, n = self.run().version, asked["prompts"], asked.get("sampling", {}).get("n", 1)
        assert version is not None
        completions = _completions(version, n, self.tokens, random.randrange(8))
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]}
        )
        pause_s = self.decode_s * random.uniform(0.5, 1.0) / len(prompts)
        for i, prompt in enumerate(prompts):
            left_s = pause_s
            while left_s > HEARTBEAT_SECONDS:
                await asyncio.sleep(HEARTBEAT_SECONDS)
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
                left_s -= HEARTBEAT_SECONDS
            await asyncio.sleep(left_s)
            ids = json.dumps(prompt["token_ids"], separators=(",", ":"))
            group = f'{{"prompt_index":{i},"prompt_token_ids":{ids},"completions":{completions}}}\n'
            await send({"type": "http.response.body", "body": group.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": wire.marker(wire.DONE) + b"\n"})


@functools.lru_cache(maxsize=64)
def _completions(version: WeightVersion, n: int, tokens: int, draw: int) -> str:
    """Return `n` completions of made-up tokens as JSON, as a server writes them."""
    drawn, span = random.Random(draw), VersionSpan(version=version, start=0, end=tokens).model_dump()
    completions = [
        {
            "token_ids": [drawn.randrange(150_000) for _ in range(tokens)],
            "logprobs": [-drawn.expovariate(2.0) for _ in range(tokens)],
            "finish_reason": "length",
            "spans": [span],
        }
        for _ in range(n)
    ]
    return json.dumps(completions, separators=(",", ":"))


def _verified(body: bytes) -> AdapterManifest:
    """Return the manifest of a blob whose tensors have its checksum; equal blobs are verified once."""
    digest = xxhash.xxh3_128_digest(body)
    if digest not in _manifests:
        header = parse_header(body[8 : 8 + header_length(body[:8])])
        elements = np.frombuffer(
            body, np.int32 if header.manifest.dtype == "float32" else np.int16, offset=header.data_offset
        )
        sums = b"".join(part.tobytes() for part in block_sums(elements, block_weights()))
        if checksum(header.layout.index, sums) != header.manifest.checksum:
            raise ChecksumMismatch("the tensors are not those that were announced")
        _manifests[digest] = header.manifest
    return _manifests[digest]


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def app(servers: Mapping[int, SimulatedServer]) -> Callable[..., Awaitable[None]]:
    """Return the ASGI application of servers by their ports."""

    async def serve(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        parts = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        try:
            await servers[scope["server"][1]].answer(scope["method"], scope["path"], headers, b"".join(parts), send)
        except LockstepError as error:
            await _respond(send, error.status, error.body().model_dump_json().encode())

    return serve


@contextlib.contextmanager
def serving(servers: Sequence[SimulatedServer]) -> Iterator[list[str]]:
    """Serve all of them on a thread, each on a port of its own; yield their URLs."""
    sockets = [socket.create_server(("127.0.0.1", 0), backlog=128) for _ in servers]
    ports = [each.getsockname()[1] for each in sockets]
    options: dict[str, Any] = {"lifespan": "off", "log_level": "error", "access_log": False, "timeout_keep_alive": 600}
    server = uvicorn.Server(uvicorn.Config(app(dict(zip(ports, servers, strict=True))), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20.0)


def main() -> int:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet.simulated", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--servers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128, help="of each completion")
    parser.add_argument("--decode-s", type=float, default=0.0, help="until a request's last group has finished")
    options = parser.parse_args()
    token = os.environ.get(TOKEN_VARIABLE)
    with serving([SimulatedServer(options.tokens, options.decode_s, token) for _ in range(options.servers)]) as urls:
        print(*urls, sep="\n", flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
