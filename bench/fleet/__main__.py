"""Several rollout servers of which one is killed and started again, and one joins late: what completions still come.

python -m bench.fleet --quick                                                          # two servers, minutes
python -m bench.fleet --cores 0.4 --json fleet.json --plot fleet.png --work-dir DIR    # three servers on one CPU

First every server is measured alone. Then the learner's own fetching loop keeps all of them busy, pushing an adapter
every few seconds, while servers come and go; between these events the tokens a second are compared with the sum of what
the servers that are up gave alone. Servers of one machine take CPU time from each other: `--cores` gives each of them
a control group with a limit (needs write access to /sys/fs/cgroup). With GPUs each server has its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common.harness import Bench
from bench.common.load import random_prompts
from bench.common.models import Policy, optimizer_step
from bench.common.report import Row, picture
from bench.common.servers import Server, visible_device
from bench.contenders.lockstep import LockstepPool
from bench.fleet.quota import quotas
from learner.utils.ports import free_port

#: Seconds after an event that belong to it: what had begun on another set of servers comes to its end.
SETTLE_S = 4.0
KV_CACHE_BYTES = 4 << 30
START_TIMEOUT_S = 600.0
Until = Callable[[], bool]


class FleetBench(Bench):
    """Tokens per second, a row for every stretch in which the same servers are up."""

    name = "fleet"
    standard = "plot shape rank server-flags"
    flags = {
        "--servers": (3, ""),
        "--cores": (float, "CPU seconds a second for each server; default: no limit"),
        "--shape": ("tiny", ""),
        "--rank": (8, "of the adapter"),
        "--seqs": (16, "--max-num-seqs of every server"),
        "--n": (4, "completions of a prompt"),
        "--tokens": (48, "of each completion"),
        "--prompts": (36, "of a batch; two batches are being fetched at the same time"),
        "--window-s": (30.0, "between two events, and for each server alone"),
        "--push-every-s": (2.0, ""),
        "--work-dir": (Path, "keeps the servers' logs and the record of the run"),
    }
    quick = "--servers 2 --window-s 8 --shape tiny --seqs 8 --prompts 12"
    figure = "tokens_per_s"
    about = {"from s": "start", "to s": "end", "servers up": "row"}
    columns = {"tokens/s": "{tokens_per_s:.0f}", "alone, summed": "{expected:.0f}", "ratio": "{ratio:.1%}"}
    what = "{row} up from {start:.0f} to {end:.0f} s"
    told = "{tokens_per_s:.0f} tokens/s, {ratio:.1%} of what they give alone"

    def check(self) -> None:
        super().check()
        if not 2 <= self.options.servers <= 26:
            raise ValueError("--servers: 2 to 26")
        self.names = [chr(ord("A") + i) for i in range(self.options.servers)]

    def run(self) -> None:
        names, options = self.names, self.options
        self.folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        self.ports = {name: free_port() for name in names}
        with self.failure_kept({"row": "fleet"}), contextlib.ExitStack() as stack:
            limit = stack.enter_context(quotas(names, options.cores))
            servers: dict[str, Server] = {}
            for name in names:
                servers[name] = self.start(name)
                stack.callback(lambda each: servers[each].end(), name)  # whichever has the name by then
            policy = Policy(self.folder, self.device, self.dtype)
            self.model = stack.enter_context(policy.adapter(options.rank, "float32"))
            for name, server in servers.items():
                server.wait_ready(START_TIMEOUT_S)
                limit(name, server.pid)
            alone = self.machine["alone_tokens_per_s"] = {name: self.alone(server) for name, server in servers.items()}
            print(f"bench: alone, tokens/s: {json.dumps({n: round(a, 1) for n, a in alone.items()})}", flush=True)
            listed = self.work / "servers.txt"
            listed.write_text("".join(f"{servers[name].url}\n" for name in names[:-1]))
            pool = LockstepPool(f"file:{listed}", self.model, self.work / "servers.jsonl")
            stack.callback(pool.close)
            with self.load(pool) as train:
                train(for_seconds(options.window_s + SETTLE_S))
                listed.write_text("".join(f"{server.url}\n" for server in servers.values()))  # the last one joins
                train(lambda: pool.up() == len(names))
                train(for_seconds(options.window_s + SETTLE_S))
                victim = names[0]
                servers[victim].kill()
                train(for_seconds(options.window_s + SETTLE_S))
                servers[victim].end()
                servers[victim] = self.start(victim)
                train(servers[victim].is_ready)
                limit(victim, servers[victim].pid)
                train(lambda: pool.up() == len(names))
                train(for_seconds(options.window_s + SETTLE_S))
            by_url = {server.url: name for name, server in servers.items()}
            self.machine["records"] = [{**record, "server": by_url[record["server"]]} for record in pool.records()]
            for row in stretches(self.machine["records"], alone):
                self.add(row, {})

    def start(self, name: str) -> Server:
        """Start the server of a name, on its port."""
        options, gpu = self.options, self.device != "cpu"
        more = ("--load-format", "dummy", "--max-runs", "1")
        setting = self.setting(options.tokens + 64, options.seqs, KV_CACHE_BYTES, *more)
        device = visible_device(self.names.index(name) + 1) if gpu else None
        # On a CPU vLLM binds every engine to the same first cores.
        env = {} if gpu else {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        setting, module = replace(setting, server_device=device), ["rollout_server.cli", str(self.folder)]
        return setting.start(f"server {name}", module, f"{name}.log", ready="/ready", port=self.ports[name], **env)

    def alone(self, server: Server) -> float:
        """Return the tokens per second of one server under its share of the load."""
        alone = contextlib.closing(LockstepPool(server.url, self.model, self.work / "alone.jsonl"))
        with alone as pool, self.load(pool, len(self.names)) as train:
            train(for_seconds(SETTLE_S))
            before, started = pool.tokens(), time.monotonic()
            train(for_seconds(self.options.window_s))
            return (pool.tokens() - before) / (time.monotonic() - started)

    @contextlib.contextmanager
    def load(self, pool: LockstepPool, share: int = 1) -> Iterator[Callable[[Until], None]]:
        """Fetch two batches of `--prompts` prompts at any time, as with `max_staleness` 1.

        Yields:
            A function that pushes, as a learner does meanwhile, until something is true.
        """
        stopping, options, steps = threading.Event(), self.options, itertools.count(1)
        count, failed = max(1, options.prompts // share), list[BaseException]()

        def loop(number: int) -> None:
            fetch = pool.fetcher(options.tokens)
            try:
                for batch in itertools.count():
                    if stopping.is_set():
                        return
                    prompts = random_prompts(count, self.shape.vocab, 32, seed=f"{number} {batch}")
                    fetch([prompt for prompt in prompts for _ in range(options.n)])
            except BaseException as error:
                failed.append(error)

        def train(until: Until) -> None:
            while not until():
                optimizer_step(self.model)
                pool.push(next(steps))
                time.sleep(options.push_every_s)

        threads = [threading.Thread(target=loop, args=(number,), daemon=True) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield train
        finally:
            stopping.set()
            for thread in threads:
                thread.join(60.0)
        if failed:
            raise failed[0]

    def headline(self, done: Sequence[Row]) -> str:
        ratios = [row["ratio"] for row in done]
        return (
            f"on {self.where}: while servers joined, were killed and came back, those that were up gave "
            f"{statistics.mean(ratios):.1%} of what they give alone (least {min(ratios):.1%} of {len(done)} stretches)"
        )

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        """Draw tokens per second of every server over time, and when servers came and went."""
        records, alone = self.machine.get("records", []), self.machine.get("alone_tokens_per_s", {})
        if not records:
            return
        x, by_server = rates(records, sorted(alone))
        start, changes = min(record["time"] for record in records), servers_up(records)
        expected = [(at - start, sum(alone[name] for name in up)) for at, up, _ in changes]
        expected.append((x[-1], expected[-1][1]))
        about = f"{self.options.servers} servers, {self.shape.name}, an adapter every {self.options.push_every_s:g} s"
        with picture(path, 10, 4.8, about, loc="outside lower center", fontsize=8, ncols=len(by_server) + 1) as axes:
            colors = ["#2f6fb0", "#e08a2c", "#3a8f4d", "#8b5fbf"]
            labels = [f"server {name}" for name in by_server]
            axes.stackplot(x, list(by_server.values()), labels=labels, alpha=0.85, colors=colors)
            for at, up, event in changes:
                name, what = event["server"], event["event"]
                if what == "serves" or what.startswith("lost"):
                    axes.axvline(at - start, color="#555", linewidth=0.8, linestyle=":")
                    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                    place |= {"xytext": (2, -2 - 9 * (len(up) % 3)), "fontsize": 7, "va": "top"}
                    axes.annotate(f"{name} {'up' if what == 'serves' else 'lost'}", (at - start, 1.0), **place)
            label = "sum of what the servers that are up give alone"
            axes.step(*zip(*expected, strict=True), where="post", color="black", linewidth=1.2, label=label)
            axes.set_xlabel("seconds")
            axes.set_ylabel("tokens a second, mean of 5 s")
            most = max(*map(sum, zip(*by_server.values(), strict=True)), *(rate for _, rate in expected))
            axes.set_ylim(0, 1.15 * most)


def for_seconds(seconds: float) -> Until:
    """Return a condition that becomes true after some seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def servers_up(records: Sequence[Row]) -> list[tuple[float, frozenset[str], Row]]:
    """Return when the servers that are up changed, which are up from then on, and the event."""
    up = frozenset[str]()
    found = []
    for event in sorted((r for r in records if "event" in r), key=lambda r: r["time"]):
        up = up | {event["server"]} if event["event"] == "serves" else up - {event["server"]}
        found.append((event["time"], up, event))
    return found


def stretches(records: Sequence[Row], alone: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return tokens per second between events, beside the sum of the servers that were up.

    Args:
        records: lines of an `EventLog`.
        alone: tokens per second of each server.
    """
    start = min(record["time"] for record in records)
    changes = servers_up(records)
    ends = [*(at for at, _, _ in changes[1:]), max(record["time"] for record in records if "tokens" in record)]
    rows = []
    for (begin, up, _), end in zip(changes, ends, strict=True):
        first, last = int(begin + SETTLE_S) + 1, int(end)  # whole seconds
        if last - first < 5 or not up:
            continue
        tokens = sum(r["tokens"] for r in records if "tokens" in r and first <= r["time"] < last)
        rate, expected = tokens / (last - first), sum(alone[name] for name in up)
        seconds = {"start": float(round(first - start)), "end": float(round(last - start))}
        about = {"row": "+".join(sorted(up)), "servers": sorted(up), **seconds}
        rows.append({**about, "tokens_per_s": rate, "expected": expected, "ratio": rate / expected})
    return rows


def rates(records: Sequence[Row], names: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
    """Return seconds since the first record, and tokens per second of every server then, mean of 5 s."""
    start = min(record["time"] for record in records)
    by_second = Counter[tuple[str, int]]()
    for record in records:
        if "tokens" in record:
            by_second[record["server"], int(record["time"])] += record["tokens"]
    seconds = range(int(start) + 1, max(second for _, second in by_second))
    smooth = {name: [statistics.fmean(by_second[name, s + d] for d in range(-2, 3)) for s in seconds] for name in names}
    return [second - start for second in seconds], smooth


if __name__ == "__main__":
    sys.exit(FleetBench().main())
