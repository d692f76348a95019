"""Slots per run: what one place, 2 and 3 slots cost, and how long pushes wait for running requests.

python -m bench.slots --quick                                   # a tiny model on the CPU, minutes
python -m bench.slots --json slots.json                         # learner GPU 0, all servers on GPU 1, idle ones wait

One place is `--apply merge` with `drain`: a slot that requests use is never written, so a server with a single adapter
slot could take one push only. Completions are of many lengths, as those of a policy are.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from bench.common.harness import Bench
from bench.common.load import compare, loaded, pushing, quiet, read_records
from bench.common.models import Policy, optimizer_step, served_rank
from bench.common.report import Row, spread, timed
from bench.common.servers import Server, Setting
from bench.contenders.lockstep import COLLECTIVE, HTTP, Lockstep, LockstepPath

KV_CACHE_BYTES = 4 << 30


class SlotsBench(Bench):
    """Seconds that pushes wait, a row for every server and pace."""

    name = "slots"
    standard = "shape rank learner-gpu server-gpu server-flags deadline-s"
    flags = {
        "--slots": ("1,2,3", "1: the live weights of --apply merge"),
        "--paces": ("0.5,2", "pushes in the median time of a completion"),
        "--requests": (32, "running at all times"),
        "--tokens": (256, "the most that a request decodes; the least is a quarter of it"),
        "--pushes": (20, "of each pace, at least"),
        "--windows": (4, "of each pace at least: quiet and pushing ones alternate"),
        "--window-s": (5.0, "seconds of each"),
    }
    quick = "--shape tiny --rank 8 --requests 8 --tokens 96 --pushes 10 --windows 2 --window-s 1.5"
    same = "rank", "requests", "tokens"
    figure = "wait_s"
    about = {"slots": "row", "pushes per completion": "pace"}
    columns = {
        "n": "{n}",
        "wait s": "{wait_s:.4f}",
        "push s": "{push_s:.4f}",
        "tokens/s": "{tokens_per_s_pushing:.0f}",
        "of quiet": "{share:.1%} ({share_error:.1%})",
        "MiB": lambda row: f"{row['slots'] * row['slot_mib']:.1f}" if row["slot_mib"] else "-",
    }
    what = "{shape} rank {rank}, {requests} requests, {row}"
    told = "{pace} pushes per completion: a push waits {wait_s:.4f} s, decoding at {share:.1%} of its rate"

    def check(self) -> None:
        super().check()
        self.numbers("slots")
        paces = self.options.paces = [float(pace) for pace in self.options.paces.split(",")]
        self.at_least(1, "slots", "requests", "tokens", "pushes", "windows")
        if min(paces) <= 0:
            raise ValueError("--paces must be more than 0")

    def run(self) -> None:
        options = self.options
        folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        setting = self.setting(options.tokens + 32, options.requests, KV_CACHE_BYTES, "--load-format", "dummy")
        starts = {slots: functools.partial(self.start, slots, setting, folder) for slots in options.slots}
        with (
            self.servers(starts, lambda slots: [self._about(slots)]) as servers,
            Policy(folder, self.device, self.dtype).adapter(options.rank, "float32") as model,
        ):
            for slots, server in servers.items():
                with self.failure_kept(self._about(slots), server=server):
                    self.in_time()
                    row = HTTP if self.device == "cpu" or setting.same_gpu else COLLECTIVE
                    with Lockstep(setting).path(row, server, model) as path:
                        for figures in self.paces(path, model, server.url, self.work / f"{slots}-slots" / "load.log"):
                            figures |= {"slot_mib": path.slot_bytes() / 2**20}
                            self.add(self._about(slots), figures)
                server.end()

    def start(self, slots: int, setting: Setting, folder: Path) -> Server:
        """Start a server with so many slots."""
        work = setting.work / f"{slots}-slots"
        work.mkdir(exist_ok=True)
        flags = (*setting.engine_flags, *server_flags(slots))
        return Lockstep(replace(setting, work=work, engine_flags=flags)).start(folder, served_rank(self.options.rank))

    def paces(self, path: LockstepPath, model: PeftModel, url: str, log: Path) -> Iterator[dict[str, Any]]:
        """Yield the figures of every pace, all under one load."""
        options, steps = self.options, itertools.count(1)
        parts: list[dict[str, float]] = []

        def push() -> None:
            optimizer_step(model)
            moved, seconds = timed(lambda: path.push(next(steps)))
            parts.append({"push": seconds, **moved.parts})

        windows: dict[float, list[tuple[float, float]]] = {}
        pushes: dict[float, list[dict[str, float]]] = {}
        lengths = (max(1, options.tokens // 4), options.tokens)
        with loaded(url, path.run_id, options.requests, lengths, self.shape.vocab, log):
            quiet(options.window_s)
            completion_s = statistics.median(record.end - record.start for record in read_records(log))
            for pace in options.paces:
                every_s = completion_s / pace
                windows[pace], parts = [], []
                while len(parts) < options.pushes or len(windows[pace]) < 2 * options.windows:
                    windows[pace].append(quiet(options.window_s))
                    windows[pace].append(pushing(max(options.window_s, 4 * every_s), push, every_s))
                pushes[pace] = parts
        for pace in options.paces:
            yield {
                "pace": pace,
                "completion_s": completion_s,
                "interval_s": completion_s / pace,
                "n": len(pushes[pace]),
                **{f"{part}_s": spread([p[part] for p in pushes[pace]]) for part in ("push", "wait", "pause")},
                **compare(read_records(log), windows[pace]),
            }

    def _about(self, slots: int) -> Row:
        return self.about_row(name_of(slots), slots=slots, shape=self.shape.name)


def server_flags(slots: int) -> tuple[str, ...]:
    """Return the flags of a server with so many slots."""
    return ("--apply", "merge") if slots == 1 else ("--slots-per-run", str(slots))


def name_of(slots: int) -> str:
    """Return the name of a server's rows."""
    return "one place (--apply merge)" if slots == 1 else f"{slots} slots"


if __name__ == "__main__":
    sys.exit(SlotsBench().main())
