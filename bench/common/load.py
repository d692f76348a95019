"""Requests for a fixed number of tokens, and a process whose requests keep a rollout server decoding under pushes.

python -m bench.common.load URL RUN_ID REQUESTS LEAST MOST VOCAB    # until it is ended

A request decodes LEAST to MOST tokens; "request START END TOKENS" is printed for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench.common.report import spread
from learner.utils.processes import ProcessGroup

GENERATE, COMPLETIONS = "/v1/generate", "/v1/completions"
Sampled = tuple[list[int], list[float]]  # token ids and logprobs of one sequence
TOKENS = 64
PROMPT_TOKENS = 16
FIRST_REQUEST_S = 120.0


def random_prompts(count: int, vocab: int, length: int, seed: int | str) -> list[list[int]]:
    """Return prompts of random token ids, the same for the same seed."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


def generate_body(prompts: Sequence[list[int]], tokens: int, policy: Any, n: int = 1, **more: Any) -> dict[str, Any]:
    """Return the body of a request to `/v1/generate`."""
    sampling = {"n": n, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    asked = [{"token_ids": prompt} for prompt in prompts]
    return {"prompts": asked, "policy": policy, "return_text": False, "sampling": sampling, **more}


def completions_body(prompt: list[int] | list[list[int]], tokens: int, n: int = 1) -> dict[str, Any]:
    """Return the body of a request to vLLM's `/v1/completions`, for the base."""
    return {
        "model": "base",
        "prompt": prompt,
        "logprobs": 0,
        "return_token_ids": True,
        "n": n,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1.0,
    }


def sampled(path: str, status: int, content: bytes, tokens: int, count: int) -> list[Sampled]:
    """Return what an answer has sampled, `tokens` tokens for each of `count` sequences.

    Raises:
        RuntimeError: the answer is an error, or has other numbers of tokens.
    """
    if status != 200:
        raise RuntimeError(f"{path} answered {status}: {content[:300]!r}")
    document = json.loads(content)
    if path == GENERATE:
        found = [(one["token_ids"], one["logprobs"]) for group in document["groups"] for one in group["completions"]]
    else:
        choices = sorted(document["choices"], key=lambda choice: choice["index"])
        found = [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
    counts = [(len(ids), len(logprobs)) for ids, logprobs in found]
    if counts != [(tokens, tokens)] * count:
        raise RuntimeError(f"{path}: tokens and logprobs came back as {counts[:8]}, not {tokens} for each of {count}")
    return found


class Record(NamedTuple):
    """One finished request, by the clock that all processes of a machine share."""

    start: float
    end: float
    tokens: int


def tokens_within(records: Sequence[Record], start: float, end: float) -> float:
    """Return the tokens decoded between two instants, each request's spread evenly over its time."""
    overlaps = ((record, min(record.end, end) - max(record.start, start)) for record in records)
    return sum(r.tokens * overlap / max(r.end - r.start, 1e-9) for r, overlap in overlaps if overlap > 0)


@contextlib.contextmanager
def loaded(url: str, run_id: str, requests: int, tokens: tuple[int, int], vocab: int, log: Path) -> Iterator[None]:
    """Keep that many requests running inside; afterwards `read_records(log)` has all that ran inside.

    Args:
        tokens: the least and the most tokens of a request.
    """
    command = [sys.executable, "-m", "bench.common.load", url, run_id, *map(str, (requests, *tokens, vocab))]
    deadline = time.monotonic() + FIRST_REQUEST_S
    with ProcessGroup(command, {}, log) as load:
        while not read_records(log):
            if load.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the load finished no request: {log.read_text()[-1000:]}")
            time.sleep(0.2)
        yield
        # Requests that were running at the end of the last window are counted once they have finished.
        longest = max(record.end - record.start for record in read_records(log))
        time.sleep(2 * longest + 0.2)
        if load.process.poll() is not None:
            raise RuntimeError(f"the load ended while it was needed: {log.read_text()[-1000:]}")


def compare(records: Sequence[Record], windows: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the rates of windows that alternate between quiet and pushing, and those of pairs of neighbours.

    `share` is the geometric mean of a pair's pushing rate by its quiet one, `share_error` its standard error: how small
    a loss the windows can show; None of a single pair, and where decoding stood still.
    """
    rates = [tokens_within(records, start, end) / (end - start) for start, end in windows]
    quiet, pushing = rates[::2], rates[1::2]
    logs = [math.log(p / q) if p else -math.inf for p, q in zip(pushing, quiet, strict=True)]
    share = math.exp(statistics.fmean(logs))
    return {
        "tokens_per_s_quiet": statistics.median(quiet),
        "tokens_per_s_pushing": statistics.median(pushing),
        "ratio": spread([p / q for q, p in zip(quiet, pushing, strict=True)]),
        "share": share,
        "share_error": share * statistics.stdev(logs) / math.sqrt(len(logs)) if share and len(logs) > 1 else None,
        "windows_tokens_per_s": [round(rate, 1) for rate in rates],
    }


def read_records(log: Path) -> list[Record]:
    """Return the requests that have finished so far."""
    lines = map(str.split, log.read_text(errors="replace").splitlines())
    return [Record(float(f[1]), float(f[2]), int(f[3])) for f in lines if len(f) == 4 and f[0] == "request"]


def quiet(seconds: float) -> tuple[float, float]:
    """Wait for a window without pushes; return its start and end."""
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def pushing(seconds: float, push: Callable[[], None], every_s: float = 1.0) -> tuple[float, float]:
    """Push every `every_s` seconds, or as soon as the last push is done, for a window; return its start and end."""
    start = time.monotonic()
    due = start
    while due < start + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        push()
        due = max(due + every_s, time.monotonic())
    time.sleep(max(0.0, start + seconds - time.monotonic()))
    return start, time.monotonic()


async def run_load(url: str, run_id: str, requests: int, least: int, most: int, vocab: int) -> None:
    """Keep `requests` requests running until the process is ended."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=requests)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0) as client:

        async def one_after_another(seed: int) -> None:
            rng = random.Random(f"load {seed}")
            for number in itertools.count():
                tokens = rng.randint(least, most)
                prompts = random_prompts(1, vocab, PROMPT_TOKENS, f"load {seed} {number}")
                start = time.monotonic()
                answer = await client.post(GENERATE, json=generate_body(prompts, tokens, "latest", run_id=run_id))
                answer.raise_for_status()
                print("request", start, time.monotonic(), tokens, flush=True)

        await asyncio.gather(*map(one_after_another, range(requests)))


if __name__ == "__main__":
    asyncio.run(run_load(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])))
