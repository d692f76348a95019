"""Seconds of a training step with rollouts up to S batches ahead, beside TRL's own server mode on the same GPUs.

python -m bench.step --quick --json step.json                           # a tiny model on the CPU, minutes
VLLM_USE_FLASHINFER_SAMPLER=0 NCCL_NVLS_ENABLE=0 python -m bench.step --shape qwen3-4b --batch 128 --staleness 0,1,2 \\
    --json step.json --plot step.png --profile-dir profiles    # learner GPU 0, servers GPU 1; the idle one waits

All trainings have the same model, prompts, group, batch and options, and run one after the other, each in a process of
its own. The weights are random and on disk, the same for learner and servers. A completion ends at any of a set of
token ids, so lengths are geometric, cut at `--tokens`. Generation alone and training alone are those of S = 0, where
server and learner take turns; what they take is the trainer's waiting for completions, and its step without that and
without the push. On a CPU server and learner share the cores: reading ahead has little to gain there.

With `--share-gpu --learner-gpu 0 --server-gpu 0` the server sleeps in one more training while the learner computes; the
other rows have both side by side on that GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.common.choices import pick_devices
from bench.common.measure import Setting
from bench.common.policy import Policy, write_weights
from bench.common.report import LATE, describe, machine
from bench.common.servers import Server, engine_flags, environment, visible_device
from bench.common.shapes import Shape, pick_shapes, served_rank
from bench.contenders.lockstep import Ours
from bench.contenders.trl_merged_weights import PeerMerged
from bench.step.figures import TRL, TURNS, Step, StepReport, figures, ours, stacked, steps_table, stop_ids
from bench.step.learner import Training
from learner.utils.processes import ProcessGroup, Stopped, stop_on_signals

QUICK = {
    "shape": "tiny",
    "rank": 8,
    "batch": 16,
    "group": 4,
    "micro_batch": 8,
    "prompt_tokens": 16,
    "tokens": 64,
    "mean_tokens": 24,
    "warm_up": 2,
}

#: Options that all rows share.
SAME = ("rank", "batch", "group", "micro_batch", "prompt_tokens", "tokens", "mean_tokens", "warm_up")


@dataclass
class Run:
    """All trainings of one shape."""

    setting: Setting
    options: argparse.Namespace
    report: StepReport
    shape: Shape
    folder: Path
    deadline: float

    def all_trainings(self) -> None:
        policy = Policy(self.folder, torch.device(self.setting.device), self.setting.dtype)
        write_weights(policy, self.shape, self.folder, self.setting.dtype)
        del policy
        if not self.setting.on_cpu:
            torch.cuda.empty_cache()
        peer = PeerMerged()
        unable = peer.unable(self.setting)
        rank = served_rank(self.options.rank)
        with contextlib.ExitStack() as stack:
            # A rollout that runs S ahead can live through S pushes.
            slots = str(max(2, *(1 + bound for bound in self.options.staleness)))
            more = shlex.split(self.options.rollout_server_flags)
            more += ["--share-gpu"] if self.options.share_gpu else []
            flags = (*self.setting.engine_flags, "--slots-per-run", slots, *more)
            own = Ours().start(replace(self.setting, engine_flags=flags), self.folder, rank)
            stack.callback(own.end)
            theirs = None if unable else peer.start(self.setting, self.folder, rank)
            if theirs is not None:
                stack.callback(theirs.end)
            started = [server for server in (own, theirs) if server is not None]
            failed = {server.name: self.not_ready(server) for server in started}  # none starts while one is measured
            for bound in self.options.staleness:
                self.one(ours(bound), own, bound, failed[own.name])
            if self.options.share_gpu:
                self.one(TURNS, own, 0, failed[own.name])
            own.end()
            # TRL's comes last: its collective operations know no deadline.
            if theirs is None:
                self.add(TRL, {"skipped": unable})
            else:
                self.one(TRL, theirs, None, failed[theirs.name])

    def not_ready(self, server: Server) -> str | None:
        """Wait for a server; why it did not come."""
        try:
            server.wait_ready(self.setting.start_timeout_s)
        except RuntimeError as error:
            return str(error)
        print(f"bench: {server.name} ready after {server.start_s:.0f} s", flush=True)
        return None

    def one(self, row: str, server: Server, max_staleness: int | None, failed: str | None) -> None:
        """One training; a failure stays within its row."""
        if failed or time.monotonic() > self.deadline:
            self.add(row, {"ok": False, "error": failed} if failed else {"skipped": LATE})
            return
        try:
            answer = self.train(row, server, max_staleness)
            self.add(row, {**figures([Step(**step) for step in answer.pop("steps")]), **answer})
        except Exception as error:
            self.add(row, {"ok": False, "error": f"{describe(error)}; {server.tail()}"})

    def train(self, row: str, server: Server, max_staleness: int | None) -> dict[str, Any]:
        """What a process of its own answers.

        Raises:
            RuntimeError: it failed, or did not end in time.
        """
        options, work = self.options, self.setting.work / re.sub(r"\W+", "-", row)
        work.mkdir(parents=True, exist_ok=True)
        profile = None
        if options.profile_dir:
            options.profile_dir.mkdir(parents=True, exist_ok=True)
            profile = str((options.profile_dir / f"{work.name}.txt").resolve())
        training = Training(
            folder=str(self.folder),
            url=server.url,
            max_staleness=max_staleness,
            vocab=self.shape.vocab,
            dtype=self.setting.dtype,
            rank=options.rank,
            batch=options.batch,
            group=options.group,
            micro_batch=options.micro_batch,
            prompt_tokens=options.prompt_tokens,
            tokens=options.tokens,
            stop_token_ids=stop_ids(self.shape.vocab, options.mean_tokens),
            steps=options.steps,
            warm_up=options.warm_up,
            output=str(work / "trainer"),
            profile=profile,
            share_gpu=row == TURNS,
        )
        asked, answered, log = work / "training.json", work / "steps.json", work / "learner.log"
        asked.write_text(json.dumps(asdict(training)))
        device = None if self.setting.on_cpu else visible_device(torch.device(self.setting.device).index)
        command = [sys.executable, "-m", "bench.step.learner", str(asked), str(answered)]
        # On two cores with a server, a second thread made the training of a tiny model six times as long.
        with ProcessGroup(command, environment(device, {} if device else {"OMP_NUM_THREADS": "1"}), log) as group:
            try:
                status = group.process.wait(options.row_limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"not done after {options.row_limit_s:.0f} s; {_end_of(log)}") from None
        if status:
            raise RuntimeError(f"the learner ended with status {status}; {_end_of(log)}")
        return dict(json.loads(answered.read_text()))

    def add(self, row: str, more: dict[str, Any]) -> None:
        options = self.options
        about = {"row": row, "shape": self.shape.name, "parameters": self.shape.parameters, "ok": True}
        same = {name: getattr(options, name) for name in SAME}
        self.report.add({**about, **same, **more})


def _end_of(log: Path) -> str:
    return f"log {log}: ...{log.read_text(errors='replace')[-600:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if no row failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    try:
        [shape] = pick_shapes(options.shape)
        served_rank(options.rank)
        options.staleness = sorted({int(bound) for bound in options.staleness.split(",")})
        check(options)
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "bench.step", *(sys.argv[1:] if argv is None else argv)])
    devices, learner, server = pick_devices(options)
    report = StepReport(options.json, machine(devices, command))
    dtype = "float32" if learner == "cpu" else "bfloat16"
    stopped = False
    # The weights are gigabytes: they never lie in --work-dir.
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        setting = Setting(work, learner, server, dtype, sized_flags(shape, options, learner))
        folder = shape.write(Path(scratch) / shape.name, dtype)
        try:
            with stop_on_signals():
                Run(setting, options, report, shape, folder, time.monotonic() + options.deadline_s).all_trainings()
        except Stopped as signal:
            print(f"bench: stopped by {signal}", file=sys.stderr)
            stopped = True
    report.write()
    if options.plot:
        stacked(
            options.plot, report.rows, f"{shape.name}, {options.batch} completions of up to {options.tokens} tokens"
        )
    document = report.document()
    print("\n" + steps_table(report.rows) + "\n\n" + document["headline"], flush=True)
    return 0 if document["ok"] and not stopped else 1


def check(options: argparse.Namespace) -> None:
    """Numbers that fit together.

    Raises:
        ValueError: naming those that do not.
    """
    if min(options.rank, options.prompt_tokens, options.tokens, options.mean_tokens, options.steps) < 1:
        raise ValueError("rank, tokens and steps are 1 or more")
    if min(*options.staleness, options.warm_up) < 0 or options.group < 2:
        raise ValueError("staleness and warm-up are 0 or more, and a group has at least 2 completions")
    if options.batch % options.micro_batch or options.batch % options.group:
        raise ValueError("a batch is made of whole micro-batches and of whole groups")


def sized_flags(shape: Shape, options: argparse.Namespace, learner: str) -> tuple[str, ...]:
    """Of every server: room for two batches, the one that is needed and one that is generated ahead."""
    length, sequences = options.prompt_tokens + options.tokens + 16, 2 * options.batch
    per_token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    used = options.prompt_tokens + 16 + min(options.tokens, 1.5 * options.mean_tokens)  # few are long, and not at once
    sizes = ("--max-model-len", str(length), "--max-num-seqs", str(sequences))
    return engine_flags(sizes, math.ceil(per_token * sequences * used), learner, options.server_flags)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model, 16 completions of up to 64 tokens a step")
    add("--json", type=Path, help="written after every row")
    add("--plot", type=Path, help="a PNG")
    add("--profile-dir", type=Path, help="a profile of one further step of each training, as text")
    add("--shape", default="qwen3-4b")
    add("--staleness", default="0,1,2", help="bounds to measure; 0 also gives generation and training alone")
    add("--rank", type=int, default=32)
    add("--batch", type=int, default=256, help="completions of a step")
    add("--group", type=int, default=8, help="completions of a prompt")
    add("--micro-batch", type=int, default=8, help="completions of a forward-backward pass")
    add("--prompt-tokens", type=int, default=64)
    add("--tokens", type=int, default=512, help="the most that a completion has")
    add("--mean-tokens", type=int, default=200, help="mean length of completions that were not cut")
    add("--steps", type=int, default=10, help="steps that are counted")
    add("--warm-up", type=int, default=3, help="steps before these")
    add("--learner-gpu", type=int, default=0)
    add("--server-gpu", type=int, default=1)
    add("--share-gpu", action="store_true", help="also S = 0 with a server that sleeps while the learner trains")
    add("--server-flags", default="", help="further vLLM flags for every server, in one string")
    add("--rollout-server-flags", default="", help="further flags for ours, in one string: --apply merge, say")
    add("--deadline-s", type=float, default=math.inf, help="start no training after this many seconds")
    add("--row-limit-s", type=float, default=600.0, help="end a training that takes longer")
    add("--work-dir", type=Path, help="keeps the logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
