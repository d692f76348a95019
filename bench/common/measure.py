"""One loop for every way to bring weights to a server: step, push, first token, by one clock."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel

from bench.common.policy import optimizer_step
from bench.common.servers import Server

#: Shorter than any block of the prefix cache, so that its answer is always computed with the weights in place.
PROBE = [5, 6, 7, 8]
PROMPT_TOKENS = 32
WARM_UP = 3


class Skip(Exception):
    """This row cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Moved:
    """What one push moved, and where its seconds went as far as the path itself knows."""

    nbytes: int
    parts: dict[str, float] = field(default_factory=dict)


class SyncPath(Protocol):
    """One way to bring the weights of a model to a server."""

    def push(self, step: int) -> Moved:
        """Bring the weights as they are now; returns when the server will sample from them."""
        ...

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        """Token and logprob of one greedy token by the weights pushed last."""
        ...

    def settle(self) -> None:
        """Clear away what the push left behind; not measured."""
        ...


@dataclass(frozen=True)
class Setting:
    """Where and how much to measure."""

    work: Path
    device: str  # of the learner: cpu or cuda:N
    server_device: str | None  # CUDA_VISIBLE_DEVICES of the server; None on a CPU
    dtype: str
    engine_flags: tuple[str, ...]
    pushes: int = 20
    under_load: int = 0
    windows: int = 4
    window_s: float = 5.0
    start_timeout_s: float = 600.0

    @property
    def on_cpu(self) -> bool:
        """No GPU is used."""
        return self.device == "cpu"

    @property
    def same_gpu(self) -> bool:
        """Learner and server share one GPU."""
        import torch

        return not self.on_cpu and torch.cuda.device_count() < 2


class Contender(Protocol):
    """A server and the paths to it: ours, or a peer's."""

    @property
    def rows(self) -> Sequence[str]:
        """Names of what can be measured."""
        ...

    @property
    def needs_rank(self) -> bool:
        """The server is started for a highest rank."""
        ...

    @property
    def notes(self) -> Mapping[str, str]:
        """What to know about a row."""
        ...

    def unable(self, setting: Setting) -> str | None:
        """Why nothing of this can be measured here; None if it can."""
        ...

    def start(self, setting: Setting, folder: Path, max_rank: int) -> Server:
        """Start the server; it need not be ready."""
        ...

    def path(self, row: str, server: Server, model: PeftModel) -> AbstractContextManager[SyncPath]:
        """The path that `row` names.

        Raises:
            Skip: not possible here.
        """
        ...


def measure(path: SyncPath, model: PeftModel, pushes: int, vocab: int) -> dict[str, Any]:
    """The timings of `pushes` pushes, after some that are not counted.

    Raises:
        RuntimeError: the server answers the same whatever is pushed.
    """
    prompts = fresh_prompts(vocab)
    answers = set()
    for step in range(1, WARM_UP + 1):
        optimizer_step(model)
        path.push(step)
        path.first_token(next(prompts))
        answers.add(path.first_token(PROBE))
        path.settle()
    if len(answers) == 1:
        raise RuntimeError(f"{WARM_UP} pushes of different weights, one answer {answers}: they had no effect")
    samples = [one_push(path, model, WARM_UP + i, next(prompts)) for i in range(1, pushes + 1)]
    return summarize(samples)


@dataclass(frozen=True)
class Sample:
    """One push: seconds from the end of the optimizer step to its return, and to the first token."""

    push_s: float
    first_token_s: float
    moved: Moved


def one_push(path: SyncPath, model: PeftModel, step: int, prompt: list[int]) -> Sample:
    """An optimizer step, a push, a token."""
    optimizer_step(model)
    started = time.perf_counter()
    moved = path.push(step)
    pushed = time.perf_counter()
    path.first_token(prompt)
    answered = time.perf_counter()
    path.settle()
    return Sample(pushed - started, answered - started, moved)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of a row."""
    parts = {name: statistics.median(s.moved.parts.get(name, 0.0) for s in samples) for name in samples[-1].moved.parts}
    return {
        "bytes": samples[-1].moved.nbytes,
        "n": len(samples),
        "push_s": spread([s.push_s for s in samples]),
        "first_token_s": spread([s.first_token_s for s in samples]),
        "parts_median_s": parts,
        "first_token_s_all": [round(s.first_token_s, 6) for s in samples],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def fresh_prompts(vocab: int, seed: int = 0) -> Iterator[list[int]]:
    """Prompts of random token ids: the prefix cache has seen none of them."""
    rng = random.Random(seed)
    while True:
        yield [rng.randrange(3, vocab) for _ in range(PROMPT_TOKENS)]


def divergence(served: Any, own: Any) -> dict[str, float]:
    """Mean |served - own| and KL(served || own) of tokens that were sampled from `served`, by two estimators.

    Args:
        served, own: tensors of logprobs, of one shape.
    """
    gap = served - own
    k3 = (-gap).expm1() + gap
    return {
        "tokens": gap.numel(),
        "mean_abs_gap": gap.abs().mean().item(),
        "max_abs_gap": gap.abs().max().item(),
        "kl_k1": gap.mean().item(),
        "kl_k3": k3.mean().item(),
    }


def random_prompts(count: int, vocab: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, the same for the same seed."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` answers, and its seconds."""
    started = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - started
