"""Slots per run: what one place, 2 and 3 slots cost, and how long pushes wait for running requests.

python -m bench.slots --quick                                   # a tiny model on the CPU, minutes
python -m bench.slots --json slots.json                         # learner GPU 0, all servers on GPU 1, idle ones wait

One place is `--apply merge` with `drain`: a slot that requests use is never written, so a server with a single adapter
slot could take one push only. Completions are of many lengths, as those of a policy are.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bench.common.background_load import compare, loaded, pushing, quiet, read_records
from bench.common.choices import pick_devices
from bench.common.measure import Setting, spread
from bench.common.policy import Policy, optimizer_step
from bench.common.report import LATE, Row, Told, aligned, describe, machine, percent, seconds
from bench.common.servers import Server, engine_flags
from bench.common.shapes import Shape, pick_shapes, served_rank
from bench.contenders.lockstep import COLLECTIVE, HTTP, OurPath, Ours
from learner.servers.client import RolloutClient
from learner.utils.processes import Stopped, stop_on_signals

PROMPT_ROOM = 32
COLUMNS = ("slots", "pushes per completion", "n", "wait s", "push s", "tokens/s", "of quiet", "MiB")
KV_CACHE_BYTES = 4 << 30


@dataclass
class Run:
    """All servers of one shape, all paces."""

    setting: Setting
    options: argparse.Namespace
    report: SlotReport
    shape: Shape
    deadline: float

    def all_servers(self) -> None:
        folder = self.shape.write(self.setting.work / self.shape.name, self.setting.dtype)
        with contextlib.ExitStack() as stack:
            servers = {}
            for slots in self.options.slots:  # all at once: starting takes longer than measuring
                servers[slots] = self.start(slots, folder)
                stack.callback(servers[slots].end)
            policy = Policy(folder, torch.device(self.setting.device), self.setting.dtype)
            model = stack.enter_context(policy.adapter(self.options.rank, "float32"))
            for slots, server in servers.items():
                self.ready(slots, server)
            for slots, server in servers.items():
                if server.start_s is not None:
                    self.one_server(slots, server, model)
                server.end()

    def start(self, slots: int, folder: Path) -> Server:
        work = self.setting.work / f"{slots}-slots"
        work.mkdir(exist_ok=True)
        ours = replace(self.setting, work=work, engine_flags=(*self.setting.engine_flags, *server_flags(slots)))
        return Ours().start(ours, folder, served_rank(self.options.rank))

    def ready(self, slots: int, server: Server) -> None:
        """Wait for a server: none is measured while another is still starting."""
        try:
            server.wait_ready(self.setting.start_timeout_s)
            print(f"bench: {name_of(slots)} ready after {server.start_s:.0f} s", flush=True)
        except RuntimeError as error:
            self.add(slots, {"ok": False, "error": str(error)})

    def one_server(self, slots: int, server: Server, model: PeftModel) -> None:
        """All rows of a server; one that fails costs its own only."""
        if time.monotonic() > self.deadline:
            self.add(slots, {"skipped": LATE})
            return
        try:
            with RolloutClient(server.url) as client:
                alone = self.setting.on_cpu or self.setting.same_gpu
                path = OurPath(client, model, HTTP if alone else COLLECTIVE)
                path.push(0)  # over HTTP, whatever comes later
                try:
                    for figures in self.paces(path, model, server.url, self.setting.work / f"{slots}-slots"):
                        self.add(slots, {**figures, "slot_mib": client.state().slot_bytes / 2**20})
                finally:
                    path.close()
        except Exception as error:
            self.add(slots, {"ok": False, "error": f"{describe(error)}; {server.tail()}"})

    def paces(self, path: OurPath, model: PeftModel, url: str, work: Path) -> Iterator[dict[str, Any]]:
        """The figures of every pace, under one load."""
        options, log, steps = self.options, work / "load.log", iter(range(1, 10**9))
        parts: list[dict[str, float]] = []

        def push() -> None:
            optimizer_step(model)
            started = time.perf_counter()
            moved = path.push(next(steps))
            parts.append({"push": time.perf_counter() - started, **moved.parts})

        windows: dict[float, list[tuple[float, float]]] = {}
        pushes: dict[float, list[dict[str, float]]] = {}
        lengths = (max(1, options.tokens // 4), options.tokens)
        with loaded(url, path.lease.run_id, options.requests, lengths, self.shape.vocab, log):
            quiet(options.window_s)
            completion_s = statistics.median(record.end - record.start for record in read_records(log))
            for pace in options.paces:
                every_s = completion_s / pace
                windows[pace], parts = [], []
                while len(parts) < options.pushes:
                    windows[pace].append(quiet(options.window_s))
                    windows[pace].append(pushing(max(options.window_s, 4 * every_s), push, every_s))
                pushes[pace] = parts
        for pace in options.paces:
            load = compare(read_records(log), windows[pace], options.requests)
            yield {
                "pace": pace,
                "completion_s": completion_s,
                "interval_s": completion_s / pace,
                "n": len(pushes[pace]),
                **{f"{part}_s": spread([p[part] for p in pushes[pace]]) for part in ("push", "wait", "pause")},
                **{name: load[name] for name in ("tokens_per_s_quiet", "tokens_per_s_pushing", "ratio")},
            }

    def add(self, slots: int, figures: dict[str, Any]) -> None:
        about = {
            "row": name_of(slots),
            "slots": slots,
            "shape": self.shape.name,
            "rank": self.options.rank,
            "requests": self.options.requests,
            "tokens": self.options.tokens,
            "ok": True,
        }
        self.report.add({**about, **figures})


def server_flags(slots: int) -> tuple[str, ...]:
    """Of a server with so many places for an adapter."""
    return ("--apply", "merge") if slots == 1 else ("--slots-per-run", str(slots))


def name_of(slots: int) -> str:
    """The row of a server."""
    return "one place (--apply merge)" if slots == 1 else f"{slots} slots"


class SlotReport(Told):
    """Rows of waits."""

    figure = "wait_s"

    def line(self, row: Row) -> str:
        return slot_line(row)


def slot_line(row: Row) -> str:
    """A row in one line."""
    what = f"{row['shape']} rank {row['rank']}, {row['requests']} requests, {row['row']}"
    if "wait_s" not in row:
        return f"{what}: {'skipped: ' + row['skipped'] if 'skipped' in row else 'ERROR ' + row['error']}"
    return (
        f"{what}, {row['pace']:g} pushes per completion: a push waits {seconds(row['wait_s'])} s, decoding at "
        f"{percent(row['ratio'])} of its rate"
    )


def slots_table(rows: Sequence[Row]) -> str:
    """All rows with their columns aligned."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        if "wait_s" not in row:
            lines.append((row["row"], "-", "0", (row.get("skipped") or row["error"]).splitlines()[0][:100], *"----"))
            continue
        memory = f"{row['slots'] * row['slot_mib']:.1f}" if row["slot_mib"] else "-"
        lines.append(
            (
                row["row"],
                f"{row['pace']:g}",
                str(row["n"]),
                seconds(row["wait_s"]),
                seconds(row["push_s"]),
                f"{row['tokens_per_s_pushing']:.0f}",
                percent(row["ratio"]),
                memory,
            )
        )
    return aligned(lines, right={1, 2, 5, 7})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if no row failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.quick:
        options.shape, options.rank, options.requests, options.pushes, options.window_s = "tiny", 8, 8, 10, 1.5
        options.tokens = 96
    try:
        [shape] = pick_shapes(options.shape)
        served_rank(options.rank)
        options.slots = sorted({int(slots) for slots in options.slots.split(",")})
        options.paces = [float(pace) for pace in options.paces.split(",")]
        if min(*options.slots, options.requests, options.tokens, options.pushes) < 1 or min(options.paces) <= 0:
            raise ValueError("slots, requests, tokens and pushes are 1 or more, paces more than 0")
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "bench.slots", *(sys.argv[1:] if argv is None else argv)])
    devices, learner, server = pick_devices(options)
    report = SlotReport(options.json, machine(devices, command))
    stopped = False
    with tempfile.TemporaryDirectory(prefix="bench-slots-") as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        dtype = "float32" if learner == "cpu" else "bfloat16"
        setting = Setting(work, learner, server, dtype, sized_flags(options, learner))
        try:
            with stop_on_signals():
                Run(setting, options, report, shape, time.monotonic() + options.deadline_s).all_servers()
        except Stopped as signal:
            print(f"bench: stopped by {signal}", file=sys.stderr)
            stopped = True
    report.write()
    document = report.document()
    print("\n" + slots_table(report.rows) + "\n\n" + document["headline"], flush=True)
    return 0 if document["ok"] and not stopped else 1


def sized_flags(options: argparse.Namespace, learner: str) -> tuple[str, ...]:
    """Of every server."""
    sizes = (
        "--load-format",
        "dummy",
        "--max-model-len",
        str(options.tokens + PROMPT_ROOM),
        "--max-num-seqs",
        str(max(2, options.requests)),
    )
    return engine_flags(sizes, KV_CACHE_BYTES, learner, options.server_flags)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.slots", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="a tiny model, rank 8, 8 requests of up to 96 tokens, 10 pushes of a pace",
    )
    add("--json", type=Path, help="written after every row")
    add("--shape", default="qwen3-4b")
    add("--rank", type=int, default=32)
    add("--slots", default="1,2,3", help="1: the live weights of --apply merge")
    add("--paces", default="0.5,2", help="pushes in the median time of a completion")
    add("--requests", type=int, default=32, help="running at all times")
    add("--tokens", type=int, default=256, help="the most that a request decodes; the least is a quarter of it")
    add("--pushes", type=int, default=20, help="of each pace, at least")
    add("--window-s", type=float, default=5.0, help="quiet and pushing windows take turns")
    add("--learner-gpu", type=int, default=0)
    add("--server-gpu", type=int, default=1)
    add("--server-flags", default="", help="further vLLM flags for every server, in one string")
    add("--deadline-s", type=float, default=float("inf"), help="measure no further server after this many seconds")
    add("--work-dir", type=Path, help="keeps the servers' logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
