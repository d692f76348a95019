"""Throughput and latency of `/v1/generate` beside the bare engine and `vllm serve`, with the same requests.

python -m bench.serve --quick                                  # a tiny model on the CPU, minutes
python -m bench.serve --json serve.json                        # all contenders side by side on GPU 0

All have the same engine: adapter slots, worker class and flags of a rollout server, and are asked for the base. They
take turns, wave by wave, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.choices import pick_devices, pick_rows
from bench.common.measure import spread
from bench.common.report import LATE, Row, Told, aligned, describe, machine, percent, whole
from bench.common.servers import engine_flags
from bench.common.shapes import Shape, pick_shapes, served_rank
from bench.serve.contenders import BARE, NOTES, OURS, ROWS, VLLM, Contender, start
from bench.serve.load import PROMPT_TOKENS, make_asks
from learner.utils.processes import Stopped, stop_on_signals

COLUMNS = (
    "shape",
    "at a time",
    "a request",
    "row",
    "n",
    "tokens/s",
    "of bare",
    "of vllm serve",
    "processor us/token",
    "request ms, median",
    "p95",
)


class ServeReport(Told):
    """Rows of throughput and latency."""

    figure = "tokens_per_s"

    def line(self, row: Row) -> str:
        what = f"{row['shape']}, {row['concurrency']} sequences at a time, {row['completions']} a request, {row['row']}"
        if "tokens_per_s" not in row:
            return f"{what}: {'skipped: ' + row['skipped'] if row.get('skipped') else 'ERROR ' + str(row.get('error'))}"
        of_bare = f", {percent(row['ratio_to_bare'])} of the bare engine" if "ratio_to_bare" in row else ""
        middle, slow = (f"{row['request_s'][key] * 1e3:.0f} ms" for key in ("median", "p95"))
        return f"{what}: {whole(row['tokens_per_s'])} tokens/s{of_bare}, a request {middle} (p95 {slow})"

    def headline(self, done: Sequence[Row]) -> str:
        """What `/v1/generate` reaches of the others, at every level."""
        where = ", ".join(dict.fromkeys(self.machine.get("devices", []))) or "this machine"
        found = [
            f"{row['shape']} at {row['concurrency']}, {row['completions']} a request: "
            f"{row['ratio_to_bare']['median']:.1%} of the bare engine"
            + (f", {row['ratio_to_vllm_serve']['median']:.1%} of vllm serve" if "ratio_to_vllm_serve" in row else "")
            for row in done
            if row["row"] == OURS and "ratio_to_bare" in row
        ]
        return f"throughput of /v1/generate on {where}: {'; '.join(found)}" if found else "nothing was measured"


def measure(
    contenders: Sequence[Contender],
    concurrency: int,
    n: int,
    options: argparse.Namespace,
    vocab: int,
    deadline: float = math.inf,
) -> None:
    """One wave of each that is not counted, then those that are; who comes first changes from round to round. A round
    counts as a whole or not at all: none begins after the deadline, and one that is interrupted is forgotten.
    """
    for number in range(options.rounds + 1):
        if number > 1 and time.monotonic() > deadline:
            return
        at_once = concurrency // n  # requests
        count, most = max(options.least, 2 * at_once), options.tokens
        asks = make_asks(count, most, vocab, seed=1000 * concurrency + number, n=n)
        warm_up = make_asks(max(4, at_once // 2), most, vocab, seed=-number, n=n)
        tokens = sum(ask.tokens for ask in asks) * n
        first = number % len(contenders)
        found: list[tuple[Contender, float, float, list[float]]] = []
        for contender in (*contenders[first:], *contenders[:first]):
            if contender.failed is None:
                try:
                    contender.wave(warm_up, at_once)  # it has been idle while the others had their turns
                    before = contender.server.processor_s()
                    seconds, each = contender.wave(asks, at_once)
                    found.append((contender, seconds, contender.server.processor_s() - before, each))
                except Exception as error:
                    contender.failed = f"{describe(error)}; {contender.server.tail()}"
        for contender, seconds, processor_s, each in found if number else ():
            contender.tokens_per_s.append(tokens / seconds)
            contender.processor_s.append(processor_s / tokens)
            contender.request_s += each


def figures(contender: Contender, contenders: Sequence[Contender]) -> dict[str, Any]:
    """A row's figures; ratios round by round against those of the same requests."""
    if contender.failed is not None:
        return {"ok": False, "error": contender.failed}
    if not contender.tokens_per_s:
        return {"skipped": LATE}
    row: dict[str, Any] = {
        "n": len(contender.tokens_per_s),
        "requests": len(contender.request_s),
        "tokens_per_s": spread(contender.tokens_per_s),
        "processor_s_per_token": spread(contender.processor_s),
        "request_s": {
            "median": statistics.median(contender.request_s),
            "p95": sorted(contender.request_s)[math.ceil(0.95 * len(contender.request_s)) - 1],
        },
        "rounds_tokens_per_s": [round(rate, 1) for rate in contender.tokens_per_s],
    }
    for name, peer in (("bare", BARE), ("vllm_serve", VLLM)):
        rates = next((c.tokens_per_s for c in contenders if c.row == peer and c.failed is None), [])
        if rates and contender.row != peer:
            pairs = zip(contender.tokens_per_s, rates, strict=True)
            row[f"ratio_to_{name}"] = spread([own / other for own, other in pairs])
    return row


def one_shape(
    shape: Shape,
    work: Path,
    options: argparse.Namespace,
    report: ServeReport,
    flags: Sequence[str],
    device: str | None,
    dtype: str,
    deadline: float,
) -> None:
    """Start everything, wait, measure every level."""

    def add(row: str, concurrency: int, n: int, found: dict[str, Any]) -> None:
        about = {
            "row": row,
            "shape": shape.name,
            "concurrency": concurrency,
            "completions": n,
            "tokens": options.tokens,
            "ok": True,
        }
        report.add({**about, **({"note": NOTES[row]} if row in NOTES else {}), **found})

    folder = shape.write(work / shape.name, dtype)
    contenders = start(shape, folder, work, options, flags, device)
    with contextlib.ExitStack() as stack:
        for server in dict.fromkeys(contender.server for contender in contenders):
            stack.callback(server.end)
        for contender in contenders:
            try:
                contender.server.wait_ready(options.start_timeout_s)
            except RuntimeError as error:
                contender.failed = str(error)
        for concurrency, n in options.levels:
            for contender in contenders:
                contender.tokens_per_s, contender.processor_s, contender.request_s = [], [], []
            try:
                if time.monotonic() < deadline:
                    measure(contenders, concurrency, n, options, shape.vocab, deadline)
            finally:  # also when it is stopped
                for contender in contenders:
                    add(contender.row, concurrency, n, figures(contender, contenders))


def serve_table(rows: Sequence[Row]) -> str:
    """All rows with their columns aligned."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        head = (row["shape"], str(row["concurrency"]), str(row["completions"]), row["row"])
        if "tokens_per_s" not in row:
            lines.append((*head, "0", str(row.get("skipped") or row.get("error")).splitlines()[0][:100], *"-----"))
            continue
        ratios = [percent(row[key]) if key in row else "-" for key in ("ratio_to_bare", "ratio_to_vllm_serve")]
        times = [f"{row['request_s'][key] * 1e3:.1f}" for key in ("median", "p95")]
        processor = whole({key: 1e6 * value for key, value in row["processor_s_per_token"].items()})
        lines.append((*head, str(row["n"]), whole(row["tokens_per_s"]), *ratios, processor, *times))
    return aligned(lines, right={1, 2, 4, 9, 10})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if no row failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.rank, options.tokens, options.concurrency = "tiny", 8, 64, "1,8,32"
    try:
        shapes = pick_shapes(options.shapes)
        served_rank(options.rank)
        options.levels = levels(options)
        options.only = pick_rows(options.only, ROWS)
    except ValueError as error:
        parser.error(str(error))
    options.learner_gpu = options.server_gpu
    command = shlex.join(["python", "-m", "bench.serve", *(sys.argv[1:] if argv is None else argv)])
    devices, learner, server = pick_devices(options)
    report = ServeReport(options.json, machine(devices[-1:], command))
    dtype = "float32" if learner == "cpu" else "bfloat16"
    deadline = time.monotonic() + options.deadline_s
    stopped = False
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        try:
            with stop_on_signals():
                for shape in shapes:
                    flags = sized_flags(shape, options, learner)
                    one_shape(shape, work, options, report, flags, server, dtype, deadline)
        except Stopped as signal:
            print(f"bench: stopped by {signal}", file=sys.stderr)
            stopped = True
    report.write()
    document = report.document()
    print("\n" + serve_table(report.rows) + "\n\n" + document["headline"], flush=True)
    return 0 if document["ok"] and not stopped else 1


def levels(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Sequences at a time and completions of each request: all pairs that are a whole number of requests.

    Raises:
        ValueError: there is none, or a number that is not 1 or more.
    """
    at_a_time, counts = (sorted({int(part) for part in text.split(",")}) for text in (options.concurrency, options.n))
    if min(*at_a_time, *counts, options.tokens, options.rounds, options.least) < 1:
        raise ValueError("concurrency, tokens, completions, rounds and requests are 1 or more")
    found = [(concurrency, n) for concurrency in at_a_time for n in counts if concurrency % n == 0]
    if not found:
        raise ValueError(f"--n {options.n}: no --concurrency is a multiple of it")
    return found


def sized_flags(shape: Shape, options: argparse.Namespace, learner: str) -> tuple[str, ...]:
    """Of every contender: room for as many requests as are ever sent at a time."""
    most, length = max(concurrency for concurrency, _ in options.levels), PROMPT_TOKENS[1] + options.tokens + 16
    per_token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    # Two rows ask one server for the same: the second must not find the prompts in its cache.
    sizes = (
        "--load-format",
        "dummy",
        "--no-enable-prefix-caching",
        "--max-model-len",
        str(length),
        "--max-num-seqs",
        str(max(2, most)),
    )
    return engine_flags(sizes, int(1.1 * per_token * most * length), learner, options.server_flags)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model, rank 8, up to 64 tokens, 1, 8 and 32 sequences at a time")
    add("--json", type=Path, help="written after every row")
    add("--shapes", default="qwen3-4b")
    add("--rank", type=int, default=32, help="of the adapter slots")
    add("--concurrency", default="1,8,32,128,256,512", help="sequences at a time; multiples of --n only")
    add("--tokens", type=int, default=256, help="the most that a completion gets; the least is a quarter of it")
    add("--n", default="1", help="completions of each request, all of one length; learners ask for a group's")
    add("--only", help="rows to measure, by the beginnings of their names, comma-separated: " + "; ".join(ROWS))
    add("--rounds", type=int, default=5, help="waves that are counted, after one that is not")
    add("--least", type=int, default=8, help="requests of a wave; twice those at a time where that is more")
    add("--server-gpu", type=int, default=0)
    add("--server-flags", default="", help="further vLLM flags for every contender, in one string")
    add("--start-timeout-s", type=float, default=900.0)
    add("--deadline-s", type=float, default=math.inf, help="begin no new round after this many seconds")
    add("--work-dir", type=Path, help="keeps the servers' logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
