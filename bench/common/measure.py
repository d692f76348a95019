"""What several benches measure with: ranges, prompts, requests and their answers, turns."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from bench.common.report import describe

Target = TypeVar("Target")
Result = TypeVar("Result")
GENERATE, COMPLETIONS = "/v1/generate", "/v1/completions"
Sampled = tuple[list[int], list[float]]  # token ids and logprobs of one sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def random_prompts(count: int, vocab: int, length: int, seed: int | str) -> list[list[int]]:
    """Return prompts of random token ids, the same for the same seed."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `call` returns, and its seconds."""
    started = time.perf_counter()
    returned = call()
    return returned, time.perf_counter() - started


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


class Turns(Generic[Target, Result]):
    """Rounds in which targets take turns, another one first in every round; round 0 is not counted.

    A round counts completely or not at all: none begins after the deadline, and one that is interrupted is forgotten.

    Attributes:
        results: of every target, those of the rounds that count.
        failed: why targets failed; they get no further turn.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets
        self.results: list[list[Result]] = [[] for _ in targets]
        self.failed: dict[int, str] = {}

    def run(self, rounds: int, turn: Callable[[Target, int], Result], late: Callable[[], bool]) -> None:
        """Run rounds that count, after one that does not; the first one is never late."""
        for number in range(rounds + 1):
            if number > 1 and late():
                return
            found: dict[int, Result] = {}
            for i in ((number + shift) % len(self.targets) for shift in range(len(self.targets))):
                if i not in self.failed:
                    try:
                        found[i] = turn(self.targets[i], number)
                    except Exception as error:
                        self.failed[i] = describe(error)
            for i, result in found.items() if number else ():
                self.results[i].append(result)
