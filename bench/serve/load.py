"""The requests of `bench.serve`: the same for every contender, so many of them at a time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

PROMPT_TOKENS = (16, 64)
WAVE_LIMIT_S = 600.0


class Ask(NamedTuple):
    """One request: a prompt of token ids, how many tokens to sample, and for how many completions each."""

    prompt: list[int]
    tokens: int
    n: int = 1


def make_asks(count: int, most: int, vocab: int, seed: int, n: int = 1) -> list[Ask]:
    """Requests of a quarter of `most` tokens up to `most`, the same for the same seed."""
    rng = random.Random(f"serve {seed}")
    return [
        Ask(
            [rng.randrange(3, vocab) for _ in range(rng.randint(*PROMPT_TOKENS))],
            rng.randint(max(1, most // 4), most),
            n,
        )
        for _ in range(count)
    ]


async def in_parallel(
    asks: Sequence[Ask], concurrency: int, send: Callable[[Ask], Awaitable[float]]
) -> tuple[float, list[float]]:
    """Send all, `concurrency` of them at any time; the seconds of the whole and of each."""
    waiting, each = iter(asks), list[float]()

    async def one_after_another() -> None:
        for ask in waiting:
            each.append(await send(ask))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one_after_another())
    return time.perf_counter() - started, each


def generate_body(ask: Ask, policy: str) -> tuple[str, dict[str, Any]]:
    """Path and body of our own route."""
    sampling = {"n": ask.n, "max_tokens": ask.tokens, "ignore_eos": True, "temperature": 1.0}
    prompts = [{"token_ids": ask.prompt}]
    return "/v1/generate", {"prompts": prompts, "policy": policy, "return_text": False, "sampling": sampling}


def completions_body(ask: Ask, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body of vLLM's."""
    body = {
        "model": model,
        "prompt": ask.prompt,
        "logprobs": 0,
        "return_token_ids": True,
        "n": ask.n,
        "max_tokens": ask.tokens,
        "ignore_eos": True,
        "temperature": 1.0,
    }
    return "/v1/completions", body


def sampled(path: str, document: Any) -> list[tuple[list[int], list[float]]]:
    """Token ids and logprobs of every completion of an answer."""
    if path == "/v1/generate":
        return [(one["token_ids"], one["logprobs"]) for one in document["groups"][0]["completions"]]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in document["choices"]]


async def http_wave(
    url: str, asks: Sequence[Ask], concurrency: int, make: Callable[[Ask], tuple[str, dict[str, Any]]]
) -> tuple[float, list[float]]:
    """One wave over HTTP; answers are read and checked after the clock has stopped.

    Raises:
        RuntimeError: an answer that is not what was asked for.
    """
    import aiohttp  # of vLLM's own dependencies; httpx would need as much of a core as a server does

    answers: list[tuple[Ask, str, int, bytes]] = []
    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, connector=limit, timeout=aiohttp.ClientTimeout(total=WAVE_LIMIT_S)
    ) as session:

        async def send(ask: Ask) -> float:
            path, body = make(ask)
            data = json.dumps(body).encode()
            started = time.perf_counter()
            async with session.post(path, data=data, headers={"content-type": "application/json"}) as answer:
                content = await answer.read()
            answers.append((ask, path, answer.status, content))
            return time.perf_counter() - started

        figures = await in_parallel(asks, concurrency, send)
    for ask, path, status, content in answers:
        if status != 200:
            raise RuntimeError(f"{path} answered {status}: {content[:300]!r}")
        counts = [(len(ids), len(logprobs)) for ids, logprobs in sampled(path, json.loads(content))]
        if counts != [(ask.tokens, ask.tokens)] * ask.n:
            raise RuntimeError(
                f"{path}: tokens and logprobs came back as {counts}, not {ask.tokens} for each of {ask.n}"
            )
    return figures
