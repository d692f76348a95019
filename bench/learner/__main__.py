"""Forward and backward passes of an optimizer step: plain TRL beside Lockstep's packed passes, one rank beside several.

python -m bench.learner --quick --json learner.json                     # a tiny model on the CPU, minutes
python -m bench.learner --shape qwen3-4b --json learner.json            # one GPU
python -m bench.learner --shape qwen3-4b --ranks 2 --only packed,compiled,DDP,FSDP2,ZeRO-3 --json ranks.json    # two

Every row is a training of TRL's GRPOTrainer with the same random weights, prompts and completions, which come from
memory: no server is there. A step scores all completions once without gradient and once with it, as TRL does for
rollouts from vLLM. With `--ranks` there are also rows of several ranks, which share a step. What a row has updated is
compared with the row on one rank that makes its passes most alike; updates are proportional to gradients here.

`--load long` has prompts of 512 tokens and completions of up to 4,096: plain TRL in micro-batches of one, with
activation checkpointing, because it does not fit otherwise, beside packed passes of the learner's own size.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.common.harness import Bench, Skip
from bench.common.models import Policy, write_weights
from bench.common.report import Row, spread
from bench.common.servers import environment, visible_device
from bench.learner.rows import (
    ALONE,
    BESIDE,
    COMPILED,
    CUT,
    PLAIN,
    SHARDED,
    TOGETHER,
    ZERO3,
    difference,
)
from learner.passes.flops import training_flops
from learner.utils.ports import free_port
from learner.utils.processes import ProcessGroup

#: For the other ranks to end by themselves once one has failed.
PATIENCE_S = 1.0


class LearnerBench(Bench):
    """Steps of a learner, a row for every way of making their passes."""

    name = "learner"
    standard = "load shape rank only deadline-s"
    row_names = (*ALONE, *TOGETHER)
    loads = {
        "long": "--prompt-tokens 512 --tokens 4096 --mean-tokens 1500 --batch 64 --micro-batch 1 --checkpointing "
        "--sharded-micro-batch 2 --steps 1 --warm-up 1 "
        f"--only '{','.join(row for row in row_names if row != CUT)}'"
    }
    flags = {
        "--ranks": (1, "GPUs of the rows of several ranks, from the first GPU on; 1: without these rows"),
        "--batch": (128, "completions of a step"),
        "--group": (8, "completions of a prompt"),
        "--micro-batch": (8, "completions of a micro-batch"),
        "--sharded-micro-batch": (16, "of one where weights are sharded: there a micro-batch is a packed pass"),
        "--prompt-tokens": (64, ""),
        "--tokens": (512, "the most that a completion has"),
        "--mean-tokens": (200, "mean length of completions that were not cut"),
        "--checkpointing": (False, "of activations, in the rows that are not packed"),
        "--pass-tokens": (0, "tokens of a packed pass; 0: the learner's default"),
        "--steps": (3, "steps that are counted"),
        "--warm-up": (2, "steps before these"),
        "--row-limit-s": (300.0, "end a training that takes longer"),
    }
    quick = (
        "--shape tiny --rank 8 --batch 16 --group 4 --micro-batch 4 --sharded-micro-batch 4 --prompt-tokens 16 "
        "--tokens 64 --mean-tokens 24"
    )
    same = (
        *("rank", "batch", "group", "micro_batch", "sharded_micro_batch", "prompt_tokens", "tokens", "mean_tokens"),
        *("pass_tokens", "checkpointing", "warm_up"),
    )
    notes = dict.fromkeys(SHARDED, "PEFT's own passes, not compiled, a pass for every micro-batch")
    figure = "step_s"
    about = {"row": "row", "ranks": "ranks"}
    columns = {
        "n": "{n}",
        "scoring s": "{score_s[median]:.2f}",
        "step s": "{step_s[median]:.2f}",
        "first step s": "{first_s:.1f}",
        "of TRL": "{of_trl:.2f}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "of peak": "{of_peak:.1%}",
        "GiB": "{allocated_gib:.1f}",
        "reserved": "{reserved_gib:.1f}",
        "beside": "{beside[row]}",
        "speed-up": "{beside[speed_up]:.2f}",
        "updates differ": "{beside[difference]:.2%}",
    }
    what = "{row}"
    told = "{step_s[median]:.2f} s a step, {tokens_per_s:,.0f} tokens/s, {allocated_gib:.1f} GiB of {reserved_gib:.1f}"

    def check(self) -> None:
        super().check()
        options = self.options
        self.at_least(1, "ranks", "batch", "micro_batch", "sharded_micro_batch", "steps")
        self.at_least(0, "warm_up")
        if options.ranks == 1:
            by_name = len(options.only) < len(self.row_names) and not options.load
            if by_name and set(options.only) & set(TOGETHER):
                raise ValueError("rows of several ranks need --ranks 2 or more")
            options.only = [row for row in options.only if row in ALONE]
        for row in options.only:
            size = options.sharded_micro_batch if row in SHARDED else options.micro_batch
            if options.batch % (size * self.ranks(row)) or options.batch // self.ranks(row) % options.group:
                raise ValueError(f"{row}: a rank's share of a batch is made of whole micro-batches and of whole groups")

    def ranks(self, row: str) -> int:
        """Return how many ranks a row has."""
        return int(self.options.ranks) if row in TOGETHER else 1

    def run(self) -> None:
        # The weights are gigabytes: they never lie in --work-dir.
        folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        policy = Policy(folder, self.device, self.dtype)
        write_weights(policy, self.shape, folder, self.dtype)
        del policy
        if self.device != "cpu":
            torch.cuda.empty_cache()
        updates: dict[str, Path] = {}
        for row in self.options.only:
            about = self.about_row(row, ranks=self.ranks(row), shape=self.shape.name)
            with self.failure_kept(about):
                self.in_time()
                self.check_place(row)
                answer, updates[row] = self.train(row, folder)
                self.add(about, self.figures(row, answer) | self.beside(row, answer, updates))

    def check_place(self, row: str) -> None:
        """Raise `Skip` where the row cannot be measured."""
        gpus = torch.cuda.device_count()
        if row == COMPILED and not gpus:
            raise Skip("layers are compiled for GPUs only")
        if gpus and gpus < self.ranks(row):
            raise Skip(f"{self.ranks(row)} ranks need as many GPUs; there are {gpus}")
        if row == ZERO3 and not importlib.util.find_spec("deepspeed"):
            raise Skip("deepspeed is not installed: pip install 'lockstep-rl[zero3]'")

    def train(self, row: str, folder: Path) -> tuple[dict[str, Any], Path]:
        """Train in processes of its own, one for a rank; return the answer of rank 0, and the file of its updates.

        Raises:
            RuntimeError: a rank failed, or the training did not end in time.
        """
        options, work, ranks = self.options, self.work / re.sub(r"\W+", "-", row), self.ranks(row)
        work.mkdir(parents=True, exist_ok=True)
        asked, answered = work / "training.json", work / "answer.json"
        matrices = self.scratch / f"{work.name}.safetensors"
        training = {name: getattr(options, name) for name in (*self.same, "steps")} | {
            "row": row,
            "ranks": ranks,
            "folder": str(folder),
            "vocab": self.shape.vocab,
            "dtype": self.dtype,
            "output": str(work / "trainer"),
        }
        asked.write_text(json.dumps(training))
        answered.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.learner.rank", *map(str, (asked, answered, matrices))]
        port, limit = free_port(), time.monotonic() + options.row_limit_s
        with contextlib.ExitStack() as stack:
            groups, logs = [], [work / f"rank{rank}.log" for rank in range(ranks)]
            for rank, log in enumerate(logs):
                own = self.environment_of(rank, ranks, port)
                groups.append(stack.enter_context(ProcessGroup(command, own, log, patience_s=PATIENCE_S)))
            ended = [group.process.poll() for group in groups]
            while None in ended and not any(ended) and time.monotonic() < limit:
                time.sleep(0.1)
                ended = [group.process.poll() for group in groups]
        for rank, status in enumerate(ended):
            if status:
                raise RuntimeError(f"rank {rank} ended with status {status}; log {logs[rank]}: ...{tail(logs[rank])}")
        if not answered.exists():
            raise RuntimeError(f"not done after {options.row_limit_s:.0f} s; log {logs[0]}: ...{tail(logs[0])}")
        return dict(json.loads(answered.read_text())), matrices

    def environment_of(self, rank: int, ranks: int, port: int) -> dict[str, str]:
        """Return the variables of a rank: those of torchrun if it is one of several."""
        device = None if self.device == "cpu" else ",".join(map(visible_device, range(ranks)))
        own = environment(device, {} if device else {"OMP_NUM_THREADS": "1"})
        if ranks == 1:
            return own
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        return own | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}

    def figures(self, row: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the figures of the row itself."""
        counted, memory = answer["steps"][self.options.warm_up :], answer["memory"]
        tokens = statistics.mean(answer["tokens"][self.options.warm_up :])
        step_s = spread([seconds for seconds, _ in counted])
        plain = next((r for r in self.measured() if r["row"] == PLAIN), {"step_s": step_s} if row == PLAIN else None)
        flops = answer["weights"] and training_flops(answer["weights"], tokens, scored=answer["scores_apart"])
        return {
            "n": len(counted),
            "step_s": step_s,
            "score_s": spread([seconds for _, seconds in counted]),
            "first_s": answer["steps"][0][0],
            "of_trl": plain and step_s["median"] / plain["step_s"]["median"],
            "tokens_per_s": tokens / step_s["median"],
            "of_peak": answer["peak_flops"] and flops and flops / step_s["median"] / answer["peak_flops"],
            "model": answer["model"],
            "fsdp_units": answer["fsdp_units"],
            "memory_of_ranks": memory,
            **{name: max(rank[name] for rank in memory) for name in memory[0]},
        }

    def beside(self, row: str, answer: Mapping[str, Any], updates: Mapping[str, Path]) -> dict[str, Any]:
        """Return the row beside one on a single rank, if such a row was measured before."""
        measured = {other["row"]: other for other in self.measured()}
        alone = next((other for other in BESIDE.get(row, ()) if other in measured and other in updates), None)
        if alone is None:
            return {}
        seconds = statistics.median(seconds for seconds, _ in answer["steps"][self.options.warm_up :])
        own, expected = load_file(updates[row]), load_file(updates[alone])
        speed_up = measured[alone]["step_s"]["median"] / seconds
        return {"beside": {"row": alone, "speed_up": speed_up, **difference(own, expected)}}

    def headline(self, done: Sequence[Row]) -> str:
        shown = "; ".join(f"{row['row']} {row['step_s']['median']:.2f} s a step" for row in done)
        return f"{self.shape.name}, LoRA rank {self.options.rank}, on {self.where}: {shown}"


def tail(log: Path, characters: int = 800) -> str:
    """Return the end of a log."""
    return log.read_text(errors="replace")[-characters:] if log.is_file() else ""


if __name__ == "__main__":
    sys.exit(LearnerBench().main())
