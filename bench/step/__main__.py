"""Seconds of a training step with rollouts up to S batches ahead, beside TRL's server mode and asynchronous trainer.

python -m bench.step --quick --json step.json                           # a tiny model on the CPU, minutes
VLLM_USE_FLASHINFER_SAMPLER=0 NCCL_NVLS_ENABLE=0 python -m bench.step --shape qwen3-4b --batch 128 --staleness 0,1,2 \\
    --json step.json --plot step.png --profile-dir profiles    # learner GPU 0, servers GPU 1; the idle one waits

All trainings have the same model, prompts, group, batch and options, and run one after the other, each in a process of
its own. The weights are random and on disk, the same for learner and servers. A completion ends at any of a set of
token ids, so lengths are geometric, cut at `--tokens`. Generation alone and training alone are those of S = 0, where
server and learner take turns; what they take is the trainer's waiting for completions, and its step without that and
without the push. On a CPU server and learner share the cores: reading ahead has little to gain there.

TRL's asynchronous trainer has the largest of our bounds as its own. `--load long` has prompts of 512 tokens and
completions of up to 4,096; the trainings of TRL checkpoint activations there, which do not fit otherwise, and server
mode is left out, because a step of it takes minutes (`--only` has it).

With `--share-gpu --learner-gpu 0 --server-gpu 0` the server sleeps in one more training while the learner computes; the
other rows have both side by side on that GPU.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common.harness import Bench
from bench.common.models import Policy, served_rank, write_weights
from bench.common.report import Row, fill, picture
from bench.common.servers import Server, Setting, environment, visible_device
from bench.contenders import trl_asynchronous
from bench.contenders.lockstep import Lockstep
from bench.contenders.trl_merged_weights import TrlMergedWeights
from bench.step.figures import (
    ASYNCHRONOUS,
    TRL,
    TURNS,
    Step,
    asynchronous,
    figures,
    ours,
    reached,
    stop_ids,
    together,
)
from learner.utils.processes import ProcessGroup

PARTS = (
    ("train_s", "training", "#2f6fb0"),
    ("sync_s", "bringing weights to the server", "#8c8c8c"),
    ("wait_s", "waiting for completions", "#e08a2c"),
)


OURS = "lockstep"
NOTE = f"{trl_asynchronous.NOTE}; stop tokens by the server's generation config"
#: What a server needs on a GPU besides weights and key-value cache.
SERVER_BYTES = 6 * 2**30


class StepBench(Bench):
    """Trainings, a row for every bound and for each of TRL's two trainers."""

    name = "step"
    standard = "plot load shape rank only learner-gpu server-gpu server-flags deadline-s"
    row_names = (OURS, TRL, ASYNCHRONOUS)
    loads = {
        "long": "--prompt-tokens 512 --tokens 4096 --mean-tokens 1500 --batch 64 --micro-batch 1 "
        f"--packed-micro-batch 8 --checkpointing --staleness 2 --steps 3 --warm-up 2 --only '{OURS},{ASYNCHRONOUS}'"
    }
    flags = {
        "--profile-dir": (Path, "a profile of one further step of each training, as text"),
        "--staleness": ("0,1,2", "bounds to measure; 0 also gives generation and training alone"),
        "--batch": (256, "completions of a step"),
        "--group": (8, "completions of a prompt"),
        "--micro-batch": (8, "completions of a forward-backward pass"),
        "--prompt-tokens": (64, ""),
        "--tokens": (512, "the most that a completion has"),
        "--mean-tokens": (200, "mean length of completions that were not cut"),
        "--steps": (10, "steps that are counted"),
        "--warm-up": (3, "steps before these"),
        "--packed-micro-batch": (32, "completions of a pass of TRL's asynchronous trainer, which packs them"),
        "--checkpointing": (False, "of activations, in TRL's trainings"),
        "--compile": ("on", "layers of our learner, on GPUs: on, off, or auto, which needs a longer training"),
        "--pass-tokens": (0, "tokens of our packed passes; 0: the learner's default"),
        "--share-gpu": (False, "also S = 0 with a server that sleeps while the learner trains"),
        "--rollout-server-flags": ("", "further flags for ours, in one string: --apply merge, say"),
        "--row-limit-s": (600.0, "end a training that takes longer"),
    }
    quick = "--shape tiny --rank 8 --batch 16 --group 4 --prompt-tokens 16 --tokens 64 --mean-tokens 24 --warm-up 2"
    same = (
        *("rank", "batch", "group", "micro_batch", "prompt_tokens", "tokens", "mean_tokens", "warm_up", "pass_tokens"),
        *("packed_micro_batch", "checkpointing"),
    )
    figure = "step_s"
    about = {"row": "row"}
    columns = {
        "n": "{n}",
        "step s": "{step_s:.2f}",
        "wait s": "{wait_s:.2f}",
        "sync s": "{sync_s:.2f}",
        "train s": "{train_s:.2f}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "server tok/s": "{server_tokens_per_s:,.0f}",
        "learner tok/s": "{learner_tokens_per_s:,.0f}",
        "learner bubble": "{learner_bubble:.0%}",
        "server bubble": "{server_bubble:.0%}",
        "learner GiB": "{allocated_gib:.0f}",
        "reserved": "{reserved_gib:.0f}",
    }
    what = "{row}"
    told = (
        "{step_s:.2f} s a step, {tokens_per_s:,.0f} tokens/s, bubble of the learner {learner_bubble:.0%}, "
        "of the server {server_bubble:.0%}"
    )

    def check(self) -> None:
        super().check()
        options = self.options
        self.numbers("staleness")
        self.at_least(1, "rank", "prompt_tokens", "tokens", "mean_tokens", "steps")
        self.at_least(0, "staleness", "warm_up")
        if options.group < 2:
            raise ValueError("a group has at least 2 completions")
        passes = options.micro_batch, min(options.batch, options.packed_micro_batch)
        if any(options.batch % size for size in (*passes, options.group)):
            raise ValueError("a batch is made of whole micro-batches and of whole groups")

    def run(self) -> None:
        options = self.options
        setting, rank = self.sized(), served_rank(options.rank)
        # The weights are gigabytes: they never lie in --work-dir.
        self.folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        policy = Policy(self.folder, self.device, self.dtype)
        write_weights(policy, self.shape, self.folder, self.dtype)
        del policy
        if self.device != "cpu":
            torch.cuda.empty_cache()
        # A rollout that runs S ahead can live through S pushes.
        slots = str(max(2, *(1 + bound for bound in options.staleness)))
        more = [*shlex.split(options.rollout_server_flags), *(["--share-gpu"] if options.share_gpu else [])]
        own = Lockstep(replace(setting, engine_flags=(*setting.engine_flags, "--slots-per-run", slots, *more)))
        most = options.staleness[-1]
        serve = functools.partial(trl_asynchronous.serve, setting, max_staleness=most, stop_token_ids=self.stop_ids())
        # TRL's come last: collective operations of the first know no deadline, the other is experimental.
        servers: dict[str, Callable[[Path, int], Server]] = {
            OURS: own.start,
            TRL: TrlMergedWeights(setting).start,
            ASYNCHRONOUS: serve,
        }
        bounds: dict[str, dict[str, int | None]] = {
            OURS: {ours(bound): bound for bound in options.staleness} | ({TURNS: 0} if options.share_gpu else {}),
            TRL: {TRL: None},
            ASYNCHRONOUS: {asynchronous(most): most} if most else {},
        }
        starts = {
            name: functools.partial(start, self.folder, rank)
            for name, start in servers.items()
            if name in options.only and bounds[name]
        }
        names, size = list(starts), self.side_by_side()
        for first in range(0, len(names), size):
            self.measure({name: starts[name] for name in names[first : first + size]}, bounds)

    def side_by_side(self) -> int:
        """Return how many servers have room beside each other on their GPU, at least one."""
        if self.device == "cpu":
            return 3
        place = min(self.options.server_gpu, torch.cuda.device_count() - 1)
        each = self.kv_cache_bytes() + 2 * self.shape.parameters + SERVER_BYTES
        return max(1, int(0.95 * torch.cuda.get_device_properties(place).total_memory / each))

    def measure(
        self, starts: Mapping[str, Callable[[], Server]], bounds: Mapping[str, Mapping[str, int | None]]
    ) -> None:
        """Add the rows of servers that run beside each other."""
        with self.servers(starts, lambda name: [self._about(row) for row in bounds[name]]) as servers:
            for name, server in servers.items():
                for row, bound in bounds[name].items():
                    with self.failure_kept(self._about(row), server=server):
                        self.in_time()
                        answer = self.train(row, server, bound)
                        steps = [Step(**step) for step in answer.pop("steps")]
                        self.add(self._about(row), {**figures(steps), **answer})
                server.end()

    def train(self, row: str, server: Server, max_staleness: int | None) -> dict[str, Any]:
        """Train in a process of its own; return its answer.

        Raises:
            RuntimeError: it failed, or did not end in time.
        """
        options, work = self.options, self.work / re.sub(r"\W+", "-", row)
        work.mkdir(parents=True, exist_ok=True)
        if options.profile_dir:
            options.profile_dir.mkdir(parents=True, exist_ok=True)
        training = {name: getattr(options, name) for name in (*self.same, "steps")} | {
            "folder": str(self.folder),
            "vocab": self.shape.vocab,
            "dtype": self.dtype,
            "url": server.url,
            "max_staleness": max_staleness,
            "asynchronous": row.startswith(ASYNCHRONOUS),
            "share_gpu": row == TURNS,
            "compile": "off" if self.device == "cpu" else options.compile,
            "stop_token_ids": self.stop_ids(),
            "output": str(work / "trainer"),
            "profile": options.profile_dir and str((options.profile_dir / f"{work.name}.txt").resolve()),
        }
        asked, answered, log = work / "training.json", work / "steps.json", work / "learner.log"
        asked.write_text(json.dumps(training))
        device = None if self.device == "cpu" else visible_device(torch.device(self.device).index)
        command = [sys.executable, "-m", "bench.step.learner", str(asked), str(answered)]
        # On two cores with a server, a second thread made the training of a tiny model six times as long.
        with ProcessGroup(command, environment(device, {} if device else {"OMP_NUM_THREADS": "1"}), log) as group:
            try:
                status = f"ended with status {group.process.wait(options.row_limit_s)}"
            except subprocess.TimeoutExpired:
                status = f"was not done after {options.row_limit_s:.0f} s"
        if group.process.returncode or not answered.exists():
            raise RuntimeError(f"the learner {status}; log {log}: ...{log.read_text(errors='replace')[-600:]}")
        return dict(json.loads(answered.read_text()))

    def _about(self, row: str) -> Row:
        note = {"note": NOTE} if row.startswith(ASYNCHRONOUS) else {}
        return self.about_row(row, shape=self.shape.name, parameters=self.shape.parameters, **note)

    def stop_ids(self) -> list[int]:
        """Return the token ids that end a completion."""
        return stop_ids(self.shape.vocab, self.options.mean_tokens)

    def kv_cache_bytes(self) -> float:
        """Return the key-value cache of two batches, the current one and one that is generated ahead."""
        options = self.options
        # Few completions are long, and not at once.
        used = options.prompt_tokens + 16 + min(options.tokens, 1.5 * options.mean_tokens)
        return self.shape.kv_bytes * 2 * options.batch * used

    def sized(self) -> Setting:
        """Return where servers run that have room for two batches."""
        options = self.options
        length = options.prompt_tokens + options.tokens + 16
        return self.setting(length, 2 * options.batch, self.kv_cache_bytes())

    def headline(self, done: Sequence[Row]) -> str:
        text = fill("{shape}, LoRA rank {rank}, {batch} completions of up to {tokens} tokens a step", done[0])
        text += f", on {self.where}: " + "; ".join(fill("{row} {step_s[median]:.2f} s a step", row) for row in done)
        shown = together(done)
        if "of_larger" in shown:
            text += "; S = 1 takes {of_larger:.2f} times the larger of generation alone ({generation_alone_s:.2f} s)"
            text += " and training alone ({training_alone_s:.2f} s)"
        if "trl_of_s1" in shown:
            text += ", TRL's server mode {trl_of_s1:.2f} times S = 1"
        if "trl_of_s2" in shown:
            text += " and {trl_of_s2:.2f} times S = 2"
        if "asynchronous_of_s2" in shown:
            text += "; TRL's asynchronous trainer takes {asynchronous_of_s2:.2f} times S = 2"
        return fill(text, shown)

    def document(self) -> dict[str, Any]:
        shown = together(self.rows)
        return super().document() | {"reached": reached(shown), "together": shown}

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        """Draw where the time of a step goes, a bar for every training, generation and training alone as lines."""
        options = self.options
        title = f"{self.shape.name}, {options.batch} completions of up to {options.tokens} tokens"
        size = 8.5, 1.8 + 0.55 * len(done)
        with picture(path, *size, title, loc="outside lower center", ncols=3, fontsize=8) as axes:
            names, left = [row["row"] for row in done], [0.0] * len(done)
            for part, label, color in PARTS:
                widths = [row[part]["mean"] for row in done]  # which add up to a step, as medians do not
                axes.barh(names, widths, 0.6, left=left, color=color, label=label)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            alone = next((row for row in done if row["row"] == ours(0)), None)
            for part, label, style in (("wait_s", "generation alone", "--"), ("train_s", "training alone", ":")):
                if alone:
                    axes.axvline(alone[part]["mean"], color="black", linestyle=style, linewidth=1.2, label=label)
            axes.invert_yaxis()
            axes.set_xlabel("seconds of a step, mean")
            axes.grid(axis="x", alpha=0.25)


if __name__ == "__main__":
    sys.exit(StepBench().main())
