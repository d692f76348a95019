"""Steps of trainings on images, and of a hybrid model: seconds, and how far the learner is from the server.

python -m bench.families --quick --json families.json                   # tiny models on the CPU, minutes
VLLM_USE_FLASHINFER_SAMPLER=0 python -m bench.families --deadline-s 540 --json families.json    # one GPU

Learner and server share one GPU, the server with `--server-share` of its memory; they take turns by waiting for each
other. A row is a `learner train` with random weights in the shape of a published model, the same files for both sides.
Images are those of recipes/vision.yaml, drawn on the spot. The reward is the share of odd token ids, so that every step
moves the adapter. Mismatch is that of the sampled tokens, |ln p_learner - ln p_server|.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.harness import Bench
from bench.common.load import random_prompts
from bench.common.report import Row, spread
from bench.common.servers import Server, Setting, environment, visible_device
from bench.families.checkpoints import CHECKPOINTS, Checkpoint
from learner.utils.processes import ProcessGroup

IMAGES, HYBRID, TEXT = "Qwen2.5-VL images", "Qwen3.5 text", "Qwen2.5-VL text"
#: Row -> its checkpoint, and that of `--quick`.
ROWS = {
    IMAGES: ("qwen2.5-vl-3b", "tiny qwen2.5-vl"),
    HYBRID: ("qwen3.5-4b", "tiny qwen3.5"),
    TEXT: ("qwen2.5-vl-3b", "tiny qwen2.5-vl"),
}
_RECIPE = Path(__file__).parents[2] / "recipes" / "vision.yaml"
_CONTEXT = 1024


class FamiliesBench(Bench):
    """Trainings, a row each."""

    name = "families"
    standard = "rank only server-flags deadline-s"
    row_names = tuple(ROWS)
    flags = {
        "--batch": (64, "completions of a step"),
        "--group": (8, "completions of a prompt"),
        "--micro-batch": (8, "completions of a forward-backward pass"),
        "--tokens": (32, "of every completion"),
        "--pixels": (168, "of a picture, on a side"),
        "--prompt-tokens": (64, "of prompts without a picture"),
        "--steps": (5, "steps that are counted"),
        "--warm-up": (1, "steps before these"),
        "--server-share": (0.4, "share of the GPU's memory for the server"),
        "--learner-flags": ("", "further flags of learner train, in one string"),
        "--row-limit-s": (400.0, "end a training that takes longer"),
    }
    quick = "--rank 8 --batch 8 --group 4 --micro-batch 4 --tokens 8 --pixels 112 --prompt-tokens 16"
    same = "rank", "batch", "group", "micro_batch", "tokens", "pixels", "prompt_tokens", "warm_up"
    figure = "step_s"
    about = {"row": "row"}
    columns = {
        "model": "{shape}, {parameters:,}",
        "n": "{n}",
        "step s": "{step_s[median]:.2f}",
        "wait s": "{wait_s[median]:.2f}",
        "push s": "{push_s[median]:.2f}",
        "mismatch": "{mismatch[mean]:.1e}",
        "KL": "{kl[mean]:.1e}",
        "largest gap of a proof": "{max_logprob_gap:.3f}",
        "learner GiB": "{learner_gib:.1f}",
        "server ready s": "{server_s:.0f}",
    }
    what = "{row}"
    told = (
        "{step_s[median]:.2f} s a step, of which {wait_s[median]:.2f} waiting, mismatch {mismatch[mean]:.1e}, "
        "KL {kl[mean]:.1e}, learner {learner_gib:.1f} GiB"
    )

    def check(self) -> None:
        super().check()
        options = self.options
        self.at_least(1, "tokens", "steps", "prompt_tokens", "pixels", "micro_batch")
        self.at_least(0, "warm_up")
        if options.group < 2 or options.batch % options.group or options.batch % options.micro_batch:
            raise ValueError("a batch is made of whole micro-batches, and of whole groups of 2 or more")

    def pick_devices(self) -> list[str]:
        devices = super().pick_devices()
        if self.device != "cpu":  # both on the first one
            self.server_device = visible_device(0)
        return devices[:1]

    def run(self) -> None:
        for row in self.options.only:
            self.row(row)

    def row(self, row: str) -> None:
        """Start a server, train, and keep what came of it."""
        checkpoint = CHECKPOINTS[ROWS[row][bool(self.options.quick)]]
        about = self.about_row(row, shape=checkpoint.name, parameters=checkpoint.parameters)
        with self.failure_kept(about):
            self.in_time()
            folder = self.scratch / checkpoint.name.replace(" ", "-")
            if not (folder / "config.json").is_file():
                checkpoint.write(folder, self.device, self.dtype)
            if self.device != "cpu":
                torch.cuda.empty_cache()
            with self.servers({row: lambda: self.start(row, checkpoint, folder)}, lambda _: [about]) as ready:
                if server := ready.get(row):
                    with self.failure_kept(about, server=server):
                        self.add(about, {**self.train(row, checkpoint, folder, server), "server_s": server.start_s})

    def start(self, row: str, checkpoint: Checkpoint, folder: Path) -> Server:
        """Start a server; it need not be ready."""
        options = self.options
        dtype = "bfloat16" if row == HYBRID else self.dtype  # the only one of vLLM's gated delta nets on CPUs
        flags = ["--max-model-len", str(_CONTEXT), "--max-num-seqs", str(max(2, options.batch)), "--dtype", dtype]
        flags += ["--max-lora-rank", str(options.rank)]
        flags += (
            ["--enforce-eager"] if self.device == "cpu" else ["--gpu-memory-utilization", str(options.server_share)]
        )
        flags += [] if row == IMAGES else ["--language-model-only"]
        setting = Setting(self.work, self.device, self.server_device, dtype, tuple(flags))
        log = f"{folder.name}-{'images' if row == IMAGES else 'text'}-server.log"
        module = ["rollout_server.cli", str(folder)]
        return setting.start("rollout-server", module, log, *shlex.split(options.server_flags), ready="/ready")

    def train(self, row: str, checkpoint: Checkpoint, folder: Path, server: Server) -> dict[str, Any]:
        """Train in a process of its own; return the figures of the row.

        Raises:
            Skip: the deadline has passed.
            RuntimeError: it failed, or did not end in time.
        """
        self.in_time()
        options, output = self.options, self.work / f"{folder.name}-{'images' if row == IMAGES else 'text'}"
        answered, log = output.with_name(f"{output.name}.json"), output.with_name(f"{output.name}-learner.log")
        command = [sys.executable, "-m", "bench.families.learner", str(answered), *self.words(row, folder, output)]
        command += ["--rollout_url", server.url, *shlex.split(options.learner_flags)]
        own = environment(self.server_device, {} if self.server_device else {"OMP_NUM_THREADS": "1"})
        limit = min(options.row_limit_s, max(self.deadline - time.monotonic(), 1.0))
        with ProcessGroup(command, own, log) as group:
            try:
                status = f"ended with status {group.process.wait(limit)}"
            except subprocess.TimeoutExpired:
                status = f"was not done after {limit:.0f} s"
        history = output / "metrics.jsonl"
        steps = [json.loads(line) for line in history.read_text().splitlines()] if history.is_file() else []
        counted = steps[options.warm_up :]
        if not counted:
            raise RuntimeError(f"the learner {status}; log {log}: ...{log.read_text(errors='replace')[-1200:]}")
        known = json.loads(answered.read_text()) if answered.is_file() else {"ended": f"the learner {status}"}
        return {**figures(counted), **known, "ok": answered.is_file()}

    def words(self, row: str, folder: Path, output: Path) -> list[str]:
        """Return the flags of the training."""
        options, cpu = self.options, self.device == "cpu"
        flags: dict[str, Any] = {
            "config": _RECIPE,
            "model_name_or_path": folder,
            "output_dir": output,
            "reward_funcs": "bench.common.training:odd_tokens",
            "eval_size": 2,
            "train_size": (options.warm_up + options.steps) * options.batch // options.group,
            "lora_r": options.rank,
            "lora_alpha": 2 * options.rank,
            "per_device_train_batch_size": options.micro_batch,
            "gradient_accumulation_steps": options.batch // options.micro_batch,
            "num_generations": options.group,
            "max_completion_length": options.tokens,
            "generation_kwargs": json.dumps({"ignore_eos": True}),
            "max_steps": options.warm_up + options.steps,
            "gradient_checkpointing": "false",
            "proof_every": 1,
            "run_page": "false",
            "dtype": self.dtype,
            "bf16": str(not cpu).lower(),
            "use_cpu": str(cpu).lower(),
        }
        if row == IMAGES:
            flags["task_args"] = json.dumps({"most": 8, "pixels": options.pixels})
        else:
            flags |= {"task": self.questions(output, flags["train_size"] + 2), "task_args": "{}"}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def questions(self, output: Path, count: int) -> Path:
        """Write prompts of random tokens, and return their file."""
        path = output.with_name(f"{output.name}-questions.jsonl")
        letters = "abcdefghijklmnopqrstuvwxyz"  # a token each
        drawn = random_prompts(count, len(letters) + 3, self.options.prompt_tokens, 0)
        prompts = ("".join(letters[token - 3] for token in ids) for ids in drawn)
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return path

    def headline(self, done: Sequence[Row]) -> str:
        return f"LoRA rank {self.options.rank}, learner and server on {self.where}: {'; '.join(map(self.line, done))}"


def figures(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a training's counted steps, lines of its metrics.jsonl."""
    drifts = [step["drift"] for step in steps]
    return {
        "n": len(steps),
        "step_s": spread([step["seconds"] for step in steps]),
        "wait_s": spread([step["wait_seconds"] for step in steps]),
        "push_s": spread([step["push_seconds"] for step in steps]),
        "mismatch": spread([drift["delta"] for drift in drifts]),
        "kl": spread([drift["kl"] for drift in drifts]),
        "drift_tokens": sum(drift["tokens"] for drift in drifts),
        "tokens": statistics.mean(step["completion_length"] or math.nan for step in steps),
    }


if __name__ == "__main__":
    sys.exit(FamiliesBench().main())
