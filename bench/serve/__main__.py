"""Throughput and latency of `/v1/generate` beside the bare engine and `vllm serve`, with the same requests.

python -m bench.serve --quick                                  # a tiny model on the CPU, minutes
python -m bench.serve --json serve.json                        # all front ends side by side on GPU 0

All have the same engine: adapter slots, worker class and flags of a rollout server, and are asked for the base. They
take turns, wave by wave, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.common.harness import Bench
from bench.common.models import Shape, served_rank
from bench.common.report import Row, fill, spread
from bench.common.servers import Setting
from bench.serve.front_ends import (
    BARE,
    NOTES,
    OURS,
    PROMPT_TOKENS,
    ROWS,
    VLLM,
    FrontEnd,
    front_end,
    make_requests,
    start,
)

RATIOS = {BARE: "ratio_to_bare", VLLM: "ratio_to_vllm_serve"}


class WaveFigures(NamedTuple):
    """Tokens per second of a wave, processor seconds a token of the process that answers, seconds of each request."""

    tokens_per_s: float
    processor_s: float
    request_s: list[float]


class ServeBench(Bench):
    """Waves of requests, the front ends taking turns."""

    name = "serve"
    standard = "shapes only server-flags deadline-s"
    flags = {
        "--rank": (32, "of the adapter slots"),
        "--concurrency": ("1,8,32,128,256,512", "sequences at a time; multiples of --n only"),
        "--tokens": (256, "the most that a completion gets; the least is a quarter of it"),
        "--n": ("1", "completions of each request, all of one length; learners ask for a group's"),
        "--rounds": (5, "waves that are counted, after one that is not"),
        "--least": (8, "requests of a wave; twice those at a time where that is more"),
        "--server-gpu": (0, ""),
        "--start-timeout-s": (900.0, "for all servers to start"),
    }
    quick = "--shapes tiny --rank 8 --tokens 64 --concurrency 1,8,32"
    row_names = tuple(ROWS)
    notes = NOTES
    same = ("tokens",)
    figure = "tokens_per_s"
    about = {"shape": "shape", "at a time": "concurrency", "a request": "completions", "row": "row"}
    columns = {
        "n": "{n}",
        "tokens/s": "{tokens_per_s:.0f}",
        "of bare": "{ratio_to_bare:.1%}",
        "of vllm serve": "{ratio_to_vllm_serve:.1%}",
        "processor us/token": "{processor_s_per_token:1e6*.0f}",
        "request ms, median": "{request_s[median]:1e3*.1f}",
        "p95": "{request_s[p95]:1e3*.1f}",
    }
    what = "{shape}, {concurrency} sequences at a time, {completions} a request, {row}"
    told = (
        "{tokens_per_s:.0f} tokens/s, {ratio_to_bare:.1%} of the bare engine, "
        "a request {request_s[median]:1e3*.0f} ms (p95 {request_s[p95]:1e3*.0f} ms)"
    )

    def check(self) -> None:
        super().check()
        options = self.options
        self.numbers("concurrency", "n")
        self.at_least(1, "concurrency", "tokens", "n", "rounds", "least")
        #: Sequences at a time and completions of each request: all pairs that make whole requests.
        self.levels = [(most, n) for most in options.concurrency for n in options.n if most % n == 0]
        if not self.levels:
            raise ValueError("--n: no --concurrency is a multiple of it")

    def pick_devices(self) -> list[str]:
        return super().pick_devices()[-1:]

    def run(self) -> None:
        for shape in self.shapes:
            folder = shape.write(self.scratch / shape.name, self.dtype)
            setting, rank = self.sized(shape), served_rank(self.options.rank)
            names = dict.fromkeys(ROWS[row] for row in self.options.only)
            starts = {name: functools.partial(start, name, setting, folder, rank) for name in names}
            with self.servers(starts, functools.partial(self._abouts, shape)) as servers:
                rows = [row for row in self.options.only if ROWS[row] in servers]
                front_ends = [front_end(row, servers[ROWS[row]]) for row in rows]
                for concurrency, n in self.levels if front_ends else ():
                    self.level(shape, front_ends, concurrency, n)

    def level(self, shape: Shape, front_ends: Sequence[FrontEnd], concurrency: int, n: int) -> None:
        """Measure all rows of a level."""
        options, at_once = self.options, concurrency // n  # requests
        count = max(options.least, 2 * at_once)

        def wave(front_end: FrontEnd, number: int) -> WaveFigures:
            # It has been idle while the others had their turns.
            front_end.wave(make_requests(max(4, at_once // 2), options.tokens, shape.vocab, -number, n), at_once)
            requests = make_requests(count, options.tokens, shape.vocab, 1000 * concurrency + number, n)
            before = front_end.server.processor_s()
            seconds, each = front_end.wave(requests, at_once)
            tokens = n * sum(request.tokens for request in requests)
            return WaveFigures(tokens / seconds, (front_end.server.processor_s() - before) / tokens, each)

        rows = [one.row for one in front_ends]
        about = functools.partial(self._about, shape, concurrency=concurrency, n=n)
        found = functools.partial(figures, rows)
        self.take_turns(front_ends, options.rounds, wave, lambda one: about(one.row), found)

    def sized(self, shape: Shape) -> Setting:
        """Return where servers run that have room for as many requests as are ever sent at a time."""
        most, length = max(most for most, _ in self.levels), PROMPT_TOKENS[1] + self.options.tokens + 16
        # Two rows ask one server for the same: the second must not find the prompts in its cache.
        more = ("--load-format", "dummy", "--no-enable-prefix-caching")
        return self.setting(length, most, 1.1 * shape.kv_bytes * most * length, *more)

    def _abouts(self, shape: Shape, name: str) -> list[Row]:
        rows = [row for row in self.options.only if ROWS[row] == name]
        return [self._about(shape, row, *level) for level in self.levels for row in rows]

    def _about(self, shape: Shape, row: str, concurrency: int, n: int) -> Row:
        return self.about_row(row, shape=shape.name, concurrency=concurrency, completions=n)

    def headline(self, done: Sequence[Row]) -> str:
        text = "{shape} at {concurrency}, {completions} a request: {ratio_to_bare[median]:.1%} of the bare engine"
        text += ", {ratio_to_vllm_serve[median]:.1%} of vllm serve"
        found = [fill(text, row) for row in done if row["row"] == OURS]
        return f"throughput of /v1/generate on {self.where}: {'; '.join(found)}" if found else "nothing was measured"


def figures(rows: Sequence[str], i: int, results: Sequence[list[WaveFigures]]) -> Row:
    """Return a row's figures, ratios round by round with the same requests."""
    waves = results[i]
    each = sorted(seconds for wave in waves for seconds in wave.request_s)
    row: dict[str, Any] = {
        "n": len(waves),
        "requests": len(each),
        "tokens_per_s": spread([wave.tokens_per_s for wave in waves]),
        "processor_s_per_token": spread([wave.processor_s for wave in waves]),
        "request_s": {"median": statistics.median(each), "p95": each[math.ceil(0.95 * len(each)) - 1]},
        "rounds_tokens_per_s": [round(wave.tokens_per_s, 1) for wave in waves],
    }
    for j, peer in enumerate(rows):
        if peer in RATIOS and j != i and len(results[j]) == len(waves):  # else it has failed
            pairs = zip(waves, results[j], strict=True)
            row[RATIOS[peer]] = spread([own.tokens_per_s / other.tokens_per_s for own, other in pairs])
    return row


if __name__ == "__main__":
    sys.exit(ServeBench().main())
