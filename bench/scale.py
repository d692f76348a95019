"""One learner and up to 1,000 servers: the processor time that it spends on anything but training.

python -m bench.scale --quick                                   # 10 and 100 simulated servers, a minute
python -m bench.scale --json scale.json                         # 10, 100 and 1,000, some minutes

The servers are simulated (`bench.fleet.simulated`): real protocol, real HTTP on loopback, no engine. The learner's side
is the real one: pool, health checks, router, pushes over HTTP, completions read with their logprobs. A batch is what
one learner trains on in a step, not what so many servers could decode. All figures are processor time of the learner's
process, exporting the adapter and the training itself left out.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psutil

from bench.common.harness import Bench
from bench.common.load import random_prompts
from bench.common.models import Policy, optimizer_step
from bench.common.report import Row
from bench.contenders.lockstep import LockstepPool
from bench.fleet.cluster import NAME, cluster_of
from bench.fleet.sockets import bytes_sent
from learner.cluster.relay import Relays
from learner.rollouts.dispatch import group_requests
from learner.servers.router import Router
from learner.utils.processes import allow_descriptors, module_command, module_environment


class ScaleBench(Bench):
    """Processor time of a step, a row for every number of servers."""

    name = "scale"
    flags = {
        "--servers": ("10,100,1000", "numbers of servers, comma-separated"),
        "--shape": ("smollm2-135m", ""),
        "--rank": (16, "of the adapter: with that shape 10 MB, as Qwen3-0.6B at rank 8"),
        "--prompts": (72, "of a batch"),
        "--prompt-tokens": (64, ""),
        "--n": (8, "completions of a prompt"),
        "--tokens": (200, "of each completion"),
        "--step-s": (10.0, "seconds of a step"),
        "--steps": (2, "of which the whole is measured"),
        "--decode-s": (4.0, "for which a server decodes its share of a batch"),
        "--relays": (0, "nodes of a Ray cluster, through which pushes go; 0: directly"),
    }
    quick = "--servers 10,100 --shape tiny --steps 1"
    same = "rank", "prompts", "n", "tokens", "relays"
    figure = "share"
    about = {"servers": "servers"}
    columns = {
        "start s": "{start_s:.2f}",
        "health, ms a step": "{health_s:1e3*.0f}",
        "push": "{push_s:1e3*.0f}",
        "push, MB sent": "{push_bytes:1e-6*.1f}",
        "routing": "{routing_s:1e3*.0f}",
        "completions": "{completions_s:1e3*.0f}",
        "whole step": "{step_cpu_s:1e3*.0f}",
        "of the step": "{share:.1%}",
        "threads": "{threads}",
    }
    what = "{servers} servers"
    told = "{step_cpu_s:1e3*.0f} ms of processor time a step, {share:.1%}"

    def check(self) -> None:
        super().check()
        self.numbers("servers")
        self.at_least(1, "servers", "prompts", "n", "tokens", "steps")

    def run(self) -> None:
        folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        with Policy(folder, self.device, self.dtype).adapter(self.options.rank, "float32") as self.model:
            for count in self.options.servers:
                about = self.about_row("servers", servers=count)
                with self.failure_kept(about), contextlib.ExitStack() as stack:
                    urls = stack.enter_context(simulated(count, self.options.tokens, self.options.decode_s))
                    if self.options.relays:
                        stack.enter_context(cluster_of(self.options.relays, urls))
                    listed = self.work / f"servers-{count}.txt"
                    listed.write_text("".join(f"{url}\n" for url in urls))
                    self.add(about, self.measured_with(f"file:{listed}"))

    def measured_with(self, place: str) -> dict[str, Any]:
        """Return the figures of the servers at a place."""
        options, relays = self.options, Relays(NAME) if self.options.relays else None
        before = time.process_time()
        with contextlib.closing(LockstepPool(place, self.model, self.work / "servers.jsonl", relays=relays)) as pool:
            start_s = time.process_time() - before
            figures = {"start_s": start_s, "servers_up": pool.up(), "threads": threading.active_count()}
            for replica in pool.pool.up():
                replica.heard_at = 0.0  # all of them silent: the most that checking their health takes
            idle_s = min(options.step_s, 10.0)
            health = used(lambda: time.sleep(idle_s)) / idle_s
            fetch, prompts = pool.fetcher(options.tokens, options.prompt_tokens), self.prompts()
            asks = group_requests(prompts)

            def without_health(call: Callable[[], Any]) -> float:
                started = time.monotonic()
                return max(0.0, used(call) - health * (time.monotonic() - started))

            sent, pushes, walls = bytes_sent(), [], []
            for step in (1, 2):
                optimizer_step(self.model)
                exported, started = pool.export_s, time.monotonic()
                taken = used(partial(pool.push, step))
                pushes.append(taken - (pool.export_s - exported))
                walls.append(time.monotonic() - started)
            push_bytes = (bytes_sent() - sent) / 2
            replicas = pool.pool.up()
            router = Router(options.tokens)
            routing = [used(lambda: router.split(asks, replicas), time.thread_time) for _ in range(3)]
            completions = [without_health(lambda: fetch(prompts)) for _ in range(2)]
            steps = [self.step(pool, step, lambda: fetch(prompts)) for step in range(3, 3 + options.steps)]
            figures |= {
                "health_s": health * options.step_s,
                "push_s": statistics.median(pushes),
                "push_wall_s": statistics.median(walls),
                "push_bytes": push_bytes,
                "routing_s": statistics.median(routing),
                "completions_s": statistics.median(completions),
                "step_cpu_s": statistics.median(steps),
                "share": statistics.median(steps) / options.step_s,
                "most_threads": self.most_threads,
                "resident_mb": psutil.Process().memory_info().rss / 1e6,
                "descriptors": psutil.Process().num_fds(),
                "servers_up_at_the_end": pool.up(),
            }
        return figures

    def prompts(self) -> list[list[int]]:
        """Return the rows of a batch."""
        options = self.options
        prompts = random_prompts(options.prompts, self.shape.vocab, options.prompt_tokens, seed="scale")
        return [prompt for prompt in prompts for _ in range(options.n)]

    def step(self, pool: LockstepPool, step: int, fetch: Callable[[], Any]) -> float:
        """Return the processor time of a whole step: a push, a batch, and waiting for the step's end."""
        optimizer_step(self.model)
        exported = pool.export_s
        end = time.monotonic() + self.options.step_s

        def whole() -> None:
            pool.push(step)
            fetch()
            self.most_threads = threading.active_count()
            if (left := end - time.monotonic()) < 0:
                print(f"bench: the step took {self.options.step_s - left:.1f} s", flush=True)
            time.sleep(max(0.0, left))

        return used(whole) - (pool.export_s - exported)

    def headline(self, done: Sequence[Row]) -> str:
        options = self.options
        return (
            f"on {self.where}: {'; '.join(map(self.line, done))}, of a {options.step_s:g} s step with "
            f"{options.prompts * options.n * options.tokens} sampled tokens"
        )


def used(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the processor time of this process during a call."""
    before = clock()
    call()
    return clock() - before


@contextlib.contextmanager
def simulated(count: int, tokens: int = 1, decode_s: float = 0.0) -> Iterator[list[str]]:
    """Run `count` simulated servers in a process of their own; yield their URLs."""
    allow_descriptors()
    flags = ["--servers", str(count), "--tokens", str(tokens), "--decode-s", str(decode_s)]
    process = subprocess.Popen(
        [*module_command("bench.fleet.simulated"), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | module_environment(),
    )
    assert process.stdin
    assert process.stdout
    try:
        yield [process.stdout.readline().strip() for _ in range(count)]
    finally:
        process.stdin.close()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(ScaleBench().main())
