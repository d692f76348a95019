"""Optimizer step done -> first token of the new version: ours and its peers, in one run on one machine.

python -m bench.sync --quick                       # a tiny model on the CPU, minutes
python -m bench.sync --json sync.json --plot sync.png --ranks 8,32,128 --share-server    # learner GPU 0, server GPU 1
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.choices import pick_devices, pick_rows
from bench.common.measure import Setting
from bench.common.report import Report, machine, plot, table
from bench.common.shapes import pick_shapes, served_rank
from bench.sync.run import ROWS, Plan, Run
from learner.utils.processes import Stopped, stop_on_signals

GPU_FLAGS = ("--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "64")
CPU_FLAGS = (
    "--load-format",
    "dummy",
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "16",
    "--enforce-eager",
)
#: Of servers that start side by side: memory is given out, not profiled, for they would count each other's.
KV_CACHE_BYTES = 4 << 30
SHARED_UTILIZATION, UTILIZATION = 0.28, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if no row failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.ranks, options.pushes = "tiny", "8", min(options.pushes, 5)
    try:
        shapes = pick_shapes(options.shapes)
        ranks = sorted({int(rank) for rank in options.ranks.split(",")})
        [served_rank(rank) for rank in ranks]
        only = pick_rows(options.only, ROWS)
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "bench.sync", *(sys.argv[1:] if argv is None else argv)])
    if options.parallel_start and not options.share_server:
        parser.error("--parallel-start needs --share-server: one server per rank would not fit side by side")
    plan = Plan(
        shapes,
        ranks,
        only,
        options.adapter_dtype,
        options.share_server,
        options.parallel_start,
        options.deadline_s,
        options.row_limit_s,
    )
    devices, learner, server = pick_devices(options)
    report = Report(options.json, machine(devices, command), kept_rows(options))
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        setting = Setting(
            work=work,
            device=learner,
            server_device=server,
            dtype="float32" if learner == "cpu" else "bfloat16",
            engine_flags=(
                *(CPU_FLAGS if learner == "cpu" else GPU_FLAGS),
                *gpu_flags(options, learner),
                *shlex.split(options.server_flags),
            ),
            pushes=options.pushes,
            under_load=options.under_load,
            windows=options.windows,
            window_s=options.window_s,
        )
        try:
            with stop_on_signals():
                Run(setting, plan, report, lambda: finish(report, options)).all_shapes()
        except Stopped as stopped:
            print(f"bench: stopped by {stopped}", file=sys.stderr)
    return finish(report, options)


def gpu_flags(options: argparse.Namespace, learner: str) -> tuple[str, ...]:
    """Memory of the server's GPU."""
    if learner == "cpu":
        return ()
    shared = ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)) if options.parallel_start else ()
    share = options.gpu_memory_utilization or (SHARED_UTILIZATION if options.parallel_start else UTILIZATION)
    return "--gpu-memory-utilization", str(share), *shared


def kept_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier run, with --append."""
    if options.append and options.json and options.json.is_file():
        return list(json.loads(options.json.read_text())["rows"])
    return []


def finish(report: Report, options: argparse.Namespace) -> int:
    """Write everything, print the table."""
    report.write()
    document = report.document()
    if options.plot:
        plot(options.plot, report.rows, "optimizer step -> first token of the new version")
    print("\n" + table(report.rows))
    print("\n" + document["headline"], flush=True)
    return 0 if document["ok"] else 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model, rank 8, at most 5 pushes")
    add("--json", type=Path, help="written after every row")
    add("--append", action="store_true", help="keep the rows that --json holds already")
    add("--plot", type=Path, help="a PNG")
    add("--shapes", default="qwen3-0.6b,qwen3-4b,qwen3-14b")
    add("--ranks", default="8,32,128")
    add("--pushes", type=int, default=20, help="pushes of a row that are counted")
    add("--only", help="rows to measure, by the beginnings of their names, comma-separated: " + "; ".join(ROWS))
    add("--adapter-dtype", default="float32", choices=("float32", "bfloat16"), help="PEFT's default is float32")
    add("--learner-gpu", type=int, default=0)
    add("--server-gpu", type=int, default=1)
    add("--gpu-memory-utilization", type=float, help=f"{UTILIZATION}; side by side {SHARED_UTILIZATION}")
    add("--server-flags", default="", help="further vLLM flags for every server, in one string")
    add("--share-server", action="store_true", help="all ranks on one server of the highest rank")
    add("--parallel-start", action="store_true", help="start all servers of a shape at once; idle ones wait")
    add("--under-load", type=int, default=0, metavar="N", help="also push while N requests are decoding")
    add("--windows", type=int, default=4, help="quiet and pushing windows of --under-load, of each")
    add("--window-s", type=float, default=5.0)
    add("--deadline-s", type=float, help="start no new row after this many seconds")
    add("--row-limit-s", type=float, default=240.0, help="end the server of a row that takes longer")
    add("--work-dir", type=Path, help="keeps the servers' logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
