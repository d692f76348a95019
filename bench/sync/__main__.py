"""Optimizer step done -> first token of the new version: ours and its peers, in one run on one machine.

python -m bench.sync --quick                       # a tiny model on the CPU, minutes
python -m bench.sync --json sync.json --plot sync.png --ranks 8,32,128 --share-server    # learner GPU 0, server GPU 1
python -m bench.sync --ranks 32 --only lockstep --fidelity --server-gpus 2 --server-flags="--tensor-parallel-size 2"

The last one has a server on GPUs 1 and 2. Of two GPUs it takes the learner's, too; NCCL is then told that the learner
is on another host, and broadcasts through TCP.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel

from bench.common.fidelity import ADAPTER_STD, fidelity
from bench.common.harness import Bench
from bench.common.load import TOKENS, compare, loaded, pushing, quiet, random_prompts, read_records
from bench.common.models import Policy, Shape, optimizer_step, served_rank, write_weights
from bench.common.report import Row, fill, grouped_picture, spread
from bench.common.servers import Server
from bench.contenders import Contender, Moved, SyncPath
from bench.contenders.lockstep import Lockstep, LockstepPath
from bench.contenders.trl_merged_weights import TrlMergedWeights
from bench.contenders.vllm_adapter_files import VllmAdapterFiles

KV_CACHE_BYTES = 4 << 30
# Merged weights come last: their collective operations know no deadline.
CONTENDERS: tuple[type[Contender], ...] = (Lockstep, VllmAdapterFiles, TrlMergedWeights)


@dataclass(frozen=True, eq=False)
class ServerPlan:
    """One server and the rows to measure on it."""

    contender: Contender
    shape: Shape
    max_rank: int
    ranks: list[int]
    rows: list[str]


def _parts(row: Row) -> str:
    text = " ".join(f"{name} {value * 1e3:.1f}" for name, value in row["parts_median_s"].items())
    if "under_load" not in row:
        return text
    return text + fill(" | decode {share:.1%} ({share_error:.1%}) of {tokens_per_s_quiet:.0f} tok/s", row["under_load"])


#: For the learner's side to notice that its server is gone.
NOTICE_S = 30.0
#: Shorter than any block of the prefix cache, so that its answer is always computed with the weights in place.
PROBE = [5, 6, 7, 8]
PROMPT_TOKENS = 32
WARM_UP = 3


class SyncBench(Bench):
    """Seconds of pushes, a row for every way."""

    name = "sync"
    standard = "plot only learner-gpu server-gpu server-gpus server-flags deadline-s"
    flags = {
        "--append": (False, "keep the rows that --json holds already"),
        "--shapes": ("qwen3-0.6b,qwen3-4b,qwen3-14b", "comma-separated"),
        "--ranks": ("8,32,128", "comma-separated"),
        "--pushes": (20, "pushes of a row that are counted"),
        "--adapter-dtype": ("float32", "or bfloat16; PEFT's default is float32"),
        "--gpu-memory-utilization": (float, "default: little, for the key-value cache has a fixed size"),
        "--share-server": (False, "all ranks on one server of the highest rank"),
        "--parallel-start": (False, "start all servers of a shape at once; idle ones wait"),
        "--fidelity": (False, "also compare served logprobs with the learner's own, after a further push of ours"),
        "--under-load": (0, "also push while so many requests are decoding"),
        "--windows": (4, "quiet and pushing windows of --under-load, of each"),
        "--window-s": (5.0, "seconds of each"),
        "--row-limit-s": (240.0, "end the server of a row that takes longer"),
    }
    quick = "--shapes tiny --ranks 8"  # and at most 5 pushes
    row_names = tuple(row for contender in CONTENDERS for row in contender.rows)
    notes = {row: note for contender in CONTENDERS for row, note in contender.notes.items()}
    figure = "first_token_s"
    about = {"shape": "shape", "rank": "rank", "row": "row"}
    columns = {
        "MB": "{bytes:1e-6*.1f}",
        "n": "{n}",
        "push s": "{push_s:.4f}",
        "first token s": "{first_token_s:.4f}",
        "workers": "{workers}",
        "mean |gap|": "{fidelity[mean_abs_gap]:.2e}",
        "median parts, ms": _parts,
    }
    what, told = "{shape} rank {rank} {row}", "first token after {first_token_s:.4f} s, push {push_s:.4f} s"

    def check(self) -> None:
        super().check()
        options = self.options
        self.numbers("ranks")
        for rank in options.ranks:
            served_rank(rank)
        if options.quick:
            options.pushes = min(options.pushes, 5)
        if options.adapter_dtype not in ("float32", "bfloat16"):
            raise ValueError("--adapter-dtype is float32 or bfloat16")
        if options.parallel_start and not options.share_server:
            raise ValueError("--parallel-start needs --share-server: one server per rank would not fit side by side")

    def run(self) -> None:
        if self.options.append and self.options.json and self.options.json.is_file():
            self.rows = list(json.loads(self.options.json.read_text())["rows"])
        for shape in self.shapes:
            plans = list(self.plans(shape))
            with self.failure_kept(*(about for plan in plans for about in self._abouts(plan))):
                self.in_time()
                folder = shape.write(self.scratch / shape.name, self.dtype)
                policy = Policy(folder, self.device, self.dtype)
                if self.options.fidelity:
                    write_weights(policy, shape, folder, self.dtype)
                for side_by_side in [plans] if self.options.parallel_start else [[plan] for plan in plans]:
                    self.measure(side_by_side, folder, policy)

    def plans(self, shape: Shape) -> Iterator[ServerPlan]:
        """Yield what to measure on which server."""
        options = self.options
        share = options.gpu_memory_utilization
        load = [] if options.fidelity else ["--load-format", "dummy"]
        more = [*load, *(["--gpu-memory-utilization", str(share)] if share else [])]
        sizes = (256, 16) if self.device == "cpu" else (1024, 64)
        setting = self.setting(*sizes, KV_CACHE_BYTES, *more)
        for contender in (make(setting) for make in CONTENDERS):
            together = options.share_server or not contender.needs_rank
            for ranks in [options.ranks] if together else [[rank] for rank in options.ranks]:
                if rows := [row for row in contender.rows if row in options.only]:
                    yield ServerPlan(contender, shape, served_rank(max(ranks)), ranks, rows)

    def measure(self, plans: Sequence[ServerPlan], folder: Path, policy: Policy) -> None:
        """Start these servers, measure their rows, and end each as soon as it is done."""
        starts: dict[ServerPlan, Callable[[], Server]] = {
            plan: functools.partial(plan.contender.start, folder, plan.max_rank) for plan in plans
        }
        with self.servers(starts, self._abouts) as servers:
            for plan, server in servers.items():
                for rank in plan.ranks:
                    with policy.adapter(rank, self.options.adapter_dtype) as model:
                        for row in plan.rows:
                            self.measure_row(plan, server, self._about(plan, row, rank, server), model)
                server.end()

    def measure_row(self, plan: ServerPlan, server: Server, about: dict[str, Any], model: PeftModel) -> None:
        """Measure one row, and ours again under load."""
        options, vocab = self.options, plan.shape.vocab
        with self.watched(server, about), self.failure_kept(about, server=server):
            self.in_time()
            with plan.contender.path(about["row"], server, model) as path:
                figures = measure(path, model, options.pushes, vocab)
                if isinstance(path, LockstepPath):
                    figures["workers"] = path.workers
                    if options.fidelity:
                        optimizer_step(model, ADAPTER_STD)
                        path.push(WARM_UP + options.pushes + 1)
                        figures["fidelity"] = fidelity(path.sample, model, vocab, adapter=True)
                self.add(about, figures)
                if options.under_load and isinstance(path, LockstepPath):
                    loaded = {**about, "row": f"{about['row']}, {options.under_load} requests decoding"}
                    load = options.under_load, options.windows, options.window_s
                    with self.failure_kept(loaded):
                        log = self.work / f"load-{path.run_id}.log"
                        self.add(loaded, under_load(path, server.url, model, log, *load, vocab))

    def _abouts(self, plan: ServerPlan) -> list[Row]:
        return [self._about(plan, row, rank) for rank in plan.ranks for row in plan.rows]

    def _about(self, plan: ServerPlan, row: str, rank: int, server: Server | None = None) -> dict[str, Any]:
        about = {"shape": plan.shape.name, "rank": rank, "parameters": plan.shape.parameters}
        about["server_max_lora_rank"] = plan.max_rank if plan.contender.needs_rank else None
        about |= {"server_gpus": self.options.server_gpus, "server_flags": self.options.server_flags}
        about |= {"server_start_s": server and server.start_s, "servers_side_by_side": self.options.parallel_start}
        return self.about_row(row, **about)

    @contextlib.contextmanager
    def watched(self, server: Server, about: Row) -> Iterator[None]:
        """End the server of a row that takes too long; where that does not help, write the row down and exit.

        A collective operation without a deadline must not take the other rows with it.
        """
        done, limit_s = threading.Event(), self.options.row_limit_s

        def watch() -> None:
            if done.wait(limit_s):
                return
            server.end()
            if not done.wait(NOTICE_S):
                error = f"nothing moved for {limit_s:.0f} s; the measurement ended here"
                self.add(about, {"ok": False, "error": error})
                self.finish()
                for other in self.running:
                    other.end()
                os._exit(3)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def headline(self, done: Sequence[Row]) -> str:
        rows = [row for row in done if "under_load" not in row] or done
        # The shape and rank that most rows were measured on, the largest of these.
        places = Counter((row["parameters"], -row["rank"]) for row in rows)
        most = max(places, key=lambda place: (places[place], place))
        best = [row for row in rows if (row["parameters"], -row["rank"]) == most]
        best.sort(key=lambda row: float(row[self.figure]["median"]))
        ways = [fill("{row} {first_token_s:.4f} s", row) for row in best]
        text = "{shape}, LoRA rank {rank}, on {where}: from the optimizer step to the first token of the new version "
        text += "(median of {n}, range): {ways}"
        return fill(text, {**best[0], "where": self.where, "ways": "; ".join(ways)})

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        title, place = "optimizer step -> first token of the new version", "{}\nrank {}"
        grouped_picture(path, done, self.figure, ("shape", "rank"), place, title, "seconds", bars=False)


class Sample(NamedTuple):
    """One push: seconds from the end of the optimizer step to its return, and to the first token."""

    push_s: float
    first_token_s: float
    moved: Moved


def measure(path: SyncPath, model: PeftModel, pushes: int, vocab: int) -> dict[str, Any]:
    """Return the timings of `pushes` pushes, after some that are not counted.

    Raises:
        RuntimeError: the server answers the same after different pushes.
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
    return summarize([one_push(path, model, WARM_UP + i, next(prompts)) for i in range(1, pushes + 1)])


def under_load(
    path: LockstepPath, url: str, model: PeftModel, log: Path, requests: int, windows: int, window_s: float, vocab: int
) -> dict[str, Any]:
    """Return the timings of one push a second while requests are decoding, and its cost in tokens per second.

    Args:
        windows: of each kind; those with pushes alternate with quiet ones.
    """
    prompts, steps, samples = fresh_prompts(vocab, seed=1), itertools.count(10_000), list[Sample]()
    spans: list[tuple[float, float]] = []
    with loaded(url, path.run_id, requests, (TOKENS, TOKENS), vocab, log):
        for _ in range(windows):
            spans.append(quiet(window_s))
            spans.append(pushing(window_s, lambda: samples.append(one_push(path, model, next(steps), next(prompts)))))
    load = {"requests": requests, "tokens_per_request": TOKENS, **compare(read_records(log), spans)}
    return {**summarize(samples), "under_load": load}


def one_push(path: SyncPath, model: PeftModel, step: int, prompt: list[int]) -> Sample:
    """Time an optimizer step, a push, a token."""
    optimizer_step(model)
    started = time.perf_counter()
    moved = path.push(step)
    pushed = time.perf_counter()
    path.first_token(prompt)
    answered = time.perf_counter()
    path.settle()
    return Sample(pushed - started, answered - started, moved)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the figures of a row."""
    parts = {name: statistics.median(s.moved.parts.get(name, 0.0) for s in samples) for name in samples[-1].moved.parts}
    return {
        "bytes": samples[-1].moved.nbytes,
        "n": len(samples),
        "push_s": spread([s.push_s for s in samples]),
        "first_token_s": spread([s.first_token_s for s in samples]),
        "parts_median_s": parts,
        "first_token_s_all": [round(s.first_token_s, 6) for s in samples],
    }


def fresh_prompts(vocab: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield prompts of random token ids that the prefix cache has not seen."""
    for number in itertools.count():
        yield from random_prompts(1, vocab, PROMPT_TOKENS, f"{seed} {number}")


if __name__ == "__main__":
    sys.exit(SyncBench().main())
