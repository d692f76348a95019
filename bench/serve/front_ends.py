"""The rows of `bench.serve`: one engine behind four front ends, and waves of the same requests for each."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.common.load import COMPLETIONS, GENERATE, completions_body, generate_body, sampled
from bench.common.servers import Server, Setting, vllm_serve

PROMPT_TOKENS = (16, 64)
WAVE_LIMIT_S = 600.0
BARE, OURS, OUR_OPENAI, VLLM = "AsyncLLM in process", "/v1/generate", "our /v1/completions", "vllm serve"
NOTES = {
    BARE: "its requests are made in its own process: no HTTP, no JSON, no client",
    OUR_OPENAI: "vLLM's own handlers in our server; they make the texts, too",
    VLLM: "with our worker class and adapter slots, so that the engine is the same; makes the texts, too",
}
ENGINE, SERVER = "engine", "rollout-server"
#: Row -> the server that it is measured on.
ROWS = {BARE: ENGINE, OURS: SERVER, OUR_OPENAI: SERVER, VLLM: VLLM}


class LoadRequest(NamedTuple):
    """One request: token ids of a prompt, how many tokens to sample, and for how many completions each."""

    prompt: list[int]
    tokens: int
    n: int = 1


def make_requests(count: int, most: int, vocab: int, seed: int, n: int = 1) -> list[LoadRequest]:
    """Return requests of a quarter of `most` tokens up to `most`, the same for the same seed."""
    rng = random.Random(f"serve {seed}")
    found = []
    for _ in range(count):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.randint(*PROMPT_TOKENS))]
        found.append(LoadRequest(prompt, rng.randint(max(1, most // 4), most), n))
    return found


async def in_parallel(
    requests: Sequence[LoadRequest], concurrency: int, send: Callable[[LoadRequest], Awaitable[float]]
) -> tuple[float, list[float]]:
    """Send all, `concurrency` of them at any time; return the seconds of the wave and of each."""
    waiting, each = iter(requests), list[float]()

    async def one_after_another() -> None:
        for request in waiting:
            each.append(await send(request))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one_after_another())
    return time.perf_counter() - started, each


async def http_wave(
    url: str, path: str, requests: Sequence[LoadRequest], concurrency: int
) -> tuple[float, list[float]]:
    """Send one wave over HTTP; answers are read and checked after the clock has stopped.

    Raises:
        RuntimeError: an answer that is not what was asked for.
    """
    import aiohttp  # of vLLM's own dependencies; httpx would need as much of a core as a server does

    answers: list[tuple[LoadRequest, int, bytes]] = []
    limit, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=WAVE_LIMIT_S)
    async with aiohttp.ClientSession(url, connector=limit, timeout=patience) as session:

        async def send(request: LoadRequest) -> float:
            prompt, tokens, n = request
            ours = path == GENERATE
            body = generate_body([prompt], tokens, "base", n) if ours else completions_body(prompt, tokens, n)
            data = json.dumps(body).encode()
            started = time.perf_counter()
            async with session.post(path, data=data, headers={"content-type": "application/json"}) as answer:
                content = await answer.read()
            answers.append((request, answer.status, content))
            return time.perf_counter() - started

        seconds = await in_parallel(requests, concurrency, send)
    for request, status, content in answers:
        sampled(path, status, content, request.tokens, request.n)
    return seconds


class FrontEnd(NamedTuple):
    """One row: a server, and how a wave is sent to it."""

    row: str
    server: Server
    wave: Callable[[Sequence[LoadRequest], int], tuple[float, list[float]]]  # seconds of the wave and of each request


def start(name: str, setting: Setting, folder: Path, max_rank: int) -> Server:
    """Start the server of a row; it need not be ready."""
    slots = "--enable-lora --max-loras 2 --max-cpu-loras 2 --logprobs-mode processed_logprobs"
    slots += " --worker-extension-cls rollout_server.worker.extension.AdapterWorker"
    modules = {
        ENGINE: ["bench.serve.engine", str(folder)],
        SERVER: ["rollout_server.cli", str(folder)],
        VLLM: [*vllm_serve(folder), *slots.split()],
    }
    flags = ("--served-model-name", "base", "--max-lora-rank", str(max_rank))
    log, ready = f"{folder.name}-{name.replace(' ', '-')}.log", "/ready" if name == SERVER else "/health"
    return setting.start(name, modules[name], log, *flags, ready=ready)


def front_end(row: str, server: Server) -> FrontEnd:
    """Return the row of a server."""
    if row == BARE:
        return FrontEnd(row, server, functools.partial(_engine_wave, server.url))
    path = GENERATE if row == OURS else COMPLETIONS
    return FrontEnd(row, server, lambda asks, at_once: asyncio.run(http_wave(server.url, path, asks, at_once)))


def _engine_wave(url: str, requests: Sequence[LoadRequest], concurrency: int) -> tuple[float, list[float]]:
    body = json.dumps({"requests": requests, "concurrency": concurrency}).encode()
    with urllib.request.urlopen(f"{url}/wave", body, timeout=WAVE_LIMIT_S) as answer:
        document = json.load(answer)
    return document["seconds"], document["each"]
