"""Several rollout servers of which one is killed and started again, and one joins late: what completions still come.

python -m bench.fleet --quick                                                          # two servers, minutes
python -m bench.fleet --cores 0.4 --json fleet.json --plot fleet.png --work-dir DIR    # three servers on one CPU

First every server is measured alone. Then the learner's own fetching loop keeps all of them busy, pushing an adapter
every few seconds, while servers come and go; between these events the tokens a second are compared with the sum of what
the servers that are up gave alone. Servers of one machine take CPU time from each other: `--cores` gives each of them
a control group with a limit (needs write access to /sys/fs/cgroup). With GPUs each server has its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import secrets
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.policy import Policy, optimizer_step
from bench.common.report import cpu_name, describe, machine
from bench.common.servers import Server, engine_flags, environment, free_port, visible_device
from bench.common.shapes import Shape, pick_shapes
from bench.fleet.quota import quotas
from bench.fleet.report import SETTLE_S, FleetReport, plot, table
from learner.rollouts.completions import AllowedVersion
from learner.rollouts.dispatch import Dispatcher, group_requests
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.event_log import EventLog
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from learner.utils.logs import show_messages
from learner.utils.processes import Stopped, stop_on_signals
from shared.errors import LockstepError
from shared.sampling import SamplingParams

KV_CACHE_BYTES = 4 << 30
START_TIMEOUT_S = 600.0


@dataclass
class Run:
    """All servers of a run, and who asks them."""

    options: argparse.Namespace
    shape: Shape
    work: Path
    report: FleetReport

    def __post_init__(self) -> None:
        self.folder = self.shape.write(self.work / self.shape.name, self.dtype)
        self.lease = Lease(f"bench-fleet-{secrets.token_hex(3)}", secrets.token_hex(16), 0)
        self.ports = {name: free_port() for name in self.options.names}

    @property
    def dtype(self) -> str:
        return "bfloat16" if torch.cuda.is_available() else "float32"

    def start(self, name: str) -> Server:
        """A server at the place that this name has."""
        options, index = self.options, self.options.names.index(name)
        sizes = (
            "--load-format",
            "dummy",
            "--max-model-len",
            str(options.tokens + 64),
            "--max-num-seqs",
            str(options.seqs),
            "--max-runs",
            "1",
        )
        cuda = torch.cuda.is_available()
        flags = engine_flags(sizes, KV_CACHE_BYTES, "cuda" if cuda else "cpu", options.server_flags)
        port = self.ports[name]
        command = [sys.executable, "-m", "rollout_server.cli", str(self.folder), "--port", str(port), *flags]
        device = visible_device(index + 1) if cuda else None
        # On a CPU vLLM binds every engine to the same first cores.
        extra = {} if cuda else {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return Server(
            f"server {name}", command, port, self.work / f"{name}.log", environment(device, extra), ready="/ready"
        )

    def dispatcher(self, pool: ServerPool) -> Dispatcher:
        sampling = SamplingParams(max_tokens=self.options.tokens, ignore_eos=True)
        return Dispatcher(pool, sampling, max_model_len=self.options.tokens + 64)

    def publisher(self, pool: ServerPool, model: Any) -> Publisher:
        return Publisher(pool, model, self.lease, takeover=True, transport="http")

    def alone(self, server: Server, model: Any) -> float:
        """Tokens a second of one server under its share of the load."""
        with RolloutClient(server.url) as client:
            pool = ServerPool.of(client)
            publisher = self.publisher(pool, model)
            publisher.push(0)
            counts: list[int] = []
            pool.on_tokens = lambda replica, count: counts.append(count)
            with self.load(pool, publisher, len(self.ports)):
                training = self.training(publisher, model)
                training(for_seconds(SETTLE_S))
                before, started = len(counts), time.monotonic()
                training(for_seconds(self.options.window_s))
                rate = sum(counts[before:]) / (time.monotonic() - started)
            publisher.delete_run()
            return rate

    def training(self, publisher: Publisher, model: Any) -> Callable[[Callable[[], bool]], None]:
        """What a learner does meanwhile: pushes, until something is so."""
        steps = iter(range(1, 10**6))

        def train(until: Callable[[], bool]) -> None:
            while not until():
                optimizer_step(model)
                publisher.push(next(steps))
                time.sleep(self.options.push_every_s)

        return train

    @contextlib.contextmanager
    def load(self, pool: ServerPool, publisher: Publisher, share: int = 1) -> Any:
        """Inside, two batches of `--prompts` prompts are being fetched at any time, as with `max_staleness` 1."""
        stopping, options = threading.Event(), self.options
        per_loop = max(1, options.prompts // share)
        failed: list[BaseException] = []

        def allowed() -> AllowedVersion:
            assert publisher.last
            return AllowedVersion(publisher.last.version, exact=False)

        def loop(seed: int) -> None:
            rng, dispatcher = random.Random(seed), self.dispatcher(pool)
            try:
                while not stopping.is_set():
                    prompts = [[rng.randrange(3, self.shape.vocab) for _ in range(32)] for _ in range(per_loop)]
                    dispatcher.dispatch(
                        group_requests([prompt for prompt in prompts for _ in range(options.n)]), allowed
                    )
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=loop, args=(seed,), daemon=True) for seed in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopping.set()
            for thread in threads:
                thread.join(60.0)
        if failed:
            raise failed[0]

    def measure(self) -> None:
        """Each alone, then all of them through their lives."""
        names, options = self.options.names, self.options
        with contextlib.ExitStack() as stack:
            groups = stack.enter_context(quotas(names, options.cores))
            servers = {name: self.start(name) for name in names}
            stack.callback(end_all, servers)
            policy = Policy(self.folder, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), self.dtype)
            model = stack.enter_context(policy.adapter(options.rank, "float32"))
            for name, server in servers.items():
                server.wait_ready(START_TIMEOUT_S)
                if name in groups:
                    groups[name].add(server.pid)
            alone = {name: self.alone(server, model) for name, server in servers.items()}
            print(f"bench: alone, tokens/s: {json.dumps({n: round(a, 1) for n, a in alone.items()})}", flush=True)
            listed = self.work / "servers.txt"
            listed.write_text("".join(f"{servers[name].url}\n" for name in names[:-1]))
            show_messages(is_main=True)
            pool = ServerPool(RolloutClient, ServerDiscovery([f"file:{listed}"]))
            pool.wait_ready(START_TIMEOUT_S)
            (log_file := self.work / "servers.jsonl").unlink(missing_ok=True)
            log = EventLog(log_file, pool)
            publisher = self.publisher(pool, model)
            publisher.push(0)
            pool.supervise(lambda replica: publisher.catch_up(replica, lambda client, state: None))
            with self.load(pool, publisher):
                training, window_s = self.training(publisher, model), options.window_s + SETTLE_S
                training(for_seconds(window_s))
                listed.write_text("".join(f"{server.url}\n" for server in servers.values()))  # the last one joins
                training(lambda: len(pool.up()) == len(names))
                training(for_seconds(window_s))
                victim = names[0]
                servers[victim].kill()
                training(for_seconds(window_s))
                servers[victim].end()
                servers[victim] = self.start(victim)
                training(lambda: _ready(servers[victim]))
                if victim in groups:
                    groups[victim].add(servers[victim].pid)
                training(lambda: len(pool.up()) == len(names))
                training(for_seconds(window_s))
            pool.close()
            log.close()
            by_url = {server.url: name for name, server in servers.items()}
            records = [json.loads(line) for line in log_file.read_text().splitlines()]
            self.report.take([{**record, "server": by_url[record["server"]]} for record in records], alone)


def for_seconds(seconds: float) -> Callable[[], bool]:
    """Becomes true then."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def end_all(servers: dict[str, Server]) -> None:
    """Whichever they are by then."""
    for server in servers.values():
        server.end()


def _ready(server: Server) -> bool:
    with contextlib.suppress(LockstepError, RuntimeError), RolloutClient(server.url) as client:
        return client.state(2.0).ready
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if nothing failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.quick:
        options.servers, options.window_s, options.shape, options.seqs = 2, 8.0, "tiny", 8
        options.prompts = 12
    options.names = [chr(ord("A") + i) for i in range(options.servers)]
    try:
        [shape] = pick_shapes(options.shape)
        if not 2 <= options.servers <= 26:
            raise ValueError("--servers: 2 to 26")
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "bench.fleet", *(sys.argv[1:] if argv is None else argv)])
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [cpu_name()]
    report = FleetReport(options.json, machine(devices, command))
    stopped = False
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        try:
            with stop_on_signals():
                Run(options, shape, work, report).measure()
        except Stopped as caught:
            print(f"bench: stopped by {caught}", file=sys.stderr)
            stopped = True
        except Exception as error:
            report.add({"row": "fleet", "ok": False, "error": describe(error)})
    report.write()
    if options.plot and "records" in report.machine:
        about = f"{options.servers} servers, {shape.name}, an adapter every {options.push_every_s:g} s"
        plot(options.plot, report.machine["records"], report.machine["alone_tokens_per_s"], about)
    document = report.document()
    print("\n" + table(report.rows) + "\n\n" + document["headline"], flush=True)
    return 0 if document["ok"] and not stopped else 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="two servers, a tiny model, windows of 8 s")
    add("--json", type=Path)
    add("--plot", type=Path, help="a PNG")
    add("--servers", type=int, default=3)
    add("--cores", type=float, help="CPU seconds a second for each server; default: no limit")
    add("--shape", default="tiny")
    add("--rank", type=int, default=8)
    add("--seqs", type=int, default=16, help="--max-num-seqs of every server")
    add("--n", type=int, default=4, help="completions of a prompt")
    add("--tokens", type=int, default=48, help="of each completion")
    add("--prompts", type=int, default=36, help="of a batch; two batches are being fetched at the same time")
    add("--window-s", type=float, default=30.0, help="between two events, and for each server alone")
    add("--push-every-s", type=float, default=2.0)
    add("--server-flags", default="", help="further vLLM flags for every server, in one string")
    add("--work-dir", type=Path, help="keeps the servers' logs and the record of the run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
