"""Forward and backward passes of an optimizer step, plain TRL beside Lockstep's packed passes, without any server.

python -m bench.learner --quick --json learner.json                     # a tiny model on the CPU, a minute
python -m bench.learner --shape qwen3-4b --json learner.json            # one GPU

Every row is a training of TRL's GRPOTrainer with the same random weights, prompts and completions, which come from
memory. A step scores all completions once without gradient and once with it, as TRL does for rollouts from vLLM.

`--load long` has prompts of 512 tokens and completions of up to 4,096: plain TRL in micro-batches of one, with
activation checkpointing, because it does not fit otherwise, beside packed passes of the learner's own size.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOTrainer

from bench.common.harness import Bench
from bench.common.load import random_prompts
from bench.common.models import Policy, peak_gib, wait_for
from bench.common.report import Row, spread
from bench.common.training import grpo_config, lora_config, odd_tokens
from learner.adapters.exporter import active_adapter
from learner.passes.flops import multiplied_weights, peak_flops, training_flops
from learner.passes.lora_product import use_one_product
from learner.rollouts.generation import RemoteRollouts
from learner.trainer.compiling import compile_layers
from learner.trainer.hooks import generate_with
from learner.trainer.packed_scoring import score_packed
from learner.trainer.padding import cut_passes, sort_rows

PLAIN, CUT, PACKED, PRODUCT = "TRL", "padding cut", "packed", "packed, LoRA as one product"
COMPILED = "packed, one product, compiled"


class LearnerBench(Bench):
    """Steps of a learner, a row for every way of making their passes."""

    name = "learner"
    standard = "load shape rank only deadline-s"
    row_names = (PLAIN, CUT, PACKED, PRODUCT, COMPILED)
    loads = {
        "long": "--prompt-tokens 512 --tokens 4096 --mean-tokens 1500 --batch 64 --micro-batch 1 --checkpointing "
        f"--steps 1 --warm-up 1 --only {PLAIN},{PACKED}"
    }
    flags = {
        "--batch": (128, "completions of a step"),
        "--group": (8, "completions of a prompt"),
        "--micro-batch": (8, "completions of a micro-batch"),
        "--prompt-tokens": (64, ""),
        "--tokens": (512, "the most that a completion has"),
        "--mean-tokens": (200, "mean length of completions that were not cut"),
        "--checkpointing": (False, "of activations, in the rows that are not packed"),
        "--pass-tokens": (0, "tokens of a packed pass; 0: the learner's default"),
        "--steps": (3, "steps that are counted"),
        "--warm-up": (2, "steps before these"),
    }
    quick = "--shape tiny --rank 8 --batch 16 --group 4 --micro-batch 4 --prompt-tokens 16 --tokens 64 --mean-tokens 24"
    same = (
        *("rank", "batch", "group", "micro_batch", "prompt_tokens", "tokens", "mean_tokens", "pass_tokens"),
        "checkpointing",
    )
    figure = "step_s"
    about = {"row": "row"}
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
    }
    what = "{row}"
    told = "{step_s[median]:.2f} s a step, {tokens_per_s:,.0f} tokens/s, {allocated_gib:.1f} GiB of {reserved_gib:.1f}"

    def run(self) -> None:
        folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        policy = Policy(folder, self.device, self.dtype)
        for row in self.options.only:
            with self.failure_kept(self.about_row(row, shape=self.shape.name)):
                self.in_time()
                self.add(self.about_row(row, shape=self.shape.name), self.train(row, policy, str(folder)))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def train(self, row: str, policy: Policy, folder: str) -> dict[str, Any]:
        """Train; return the figures of the row."""
        options = self.options
        rollouts, checkpointing = _Rollouts(self), options.checkpointing and row in (PLAIN, CUT)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        forward = policy.base.forward
        trainer = GRPOTrainer(
            model=policy.base,
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            args=grpo_config(
                options,
                output=str(self.scratch / "run"),
                cpu=self.device == "cpu",
                dtype=self.dtype,
                max_steps=options.warm_up + options.steps,
                checkpointing=checkpointing,
            ),
            reward_funcs=odd_tokens,
            peft_config=lora_config(options.rank),
            train_dataset=Dataset.from_dict({"prompt": rollouts.prompts()}),
        )
        generate_with(trainer, cast(RemoteRollouts, rollouts))
        if row in (PRODUCT, COMPILED):
            use_one_product(trainer.model, active_adapter(trainer.model))
        if row == CUT:
            cut_passes(trainer)
            sort_rows(trainer)
        elif row != PLAIN and score_packed(trainer, options.pass_tokens or None) is None:
            raise RuntimeError("the passes of this model cannot be packed here")
        if row == COMPILED:
            compile_layers(trainer, "on", lambda: math.nan)
        watch = _Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
        trainer.model.unload()
        policy.base.forward = forward
        if checkpointing:
            policy.base.gradient_checkpointing_disable()
            policy.base.disable_input_require_grads()
        counted = watch.steps[options.warm_up :]
        tokens = statistics.mean(rollouts.tokens[options.warm_up : options.warm_up + options.steps])
        step_s = spread([seconds for seconds, _ in counted])
        plain = next((r for r in self.measured() if r["row"] == PLAIN), {"step_s": step_s} if row == PLAIN else None)
        peak, weights = peak_flops(policy.base.device), multiplied_weights(policy.base)
        return {
            "n": len(counted),
            "step_s": step_s,
            "score_s": spread([seconds for _, seconds in counted]),
            "first_s": watch.steps[0][0],
            "of_trl": plain and step_s["median"] / plain["step_s"]["median"],
            "tokens_per_s": tokens / step_s["median"],
            "of_peak": peak and weights and training_flops(weights, tokens) / step_s["median"] / peak,
            "checkpointed": checkpointing,
            **peak_gib(),
        }

    def headline(self, done: Sequence[Row]) -> str:
        shown = "; ".join(f"{row['row']} {row['step_s']['median']:.2f} s a step" for row in done)
        return f"{self.shape.name}, LoRA rank {self.options.rank}, on {self.where}: {shown}"


class _Rollouts:
    """Completions of random tokens with geometric lengths, in place of a rollout server; the same for every row."""

    def __init__(self, bench: LearnerBench) -> None:
        self._options, self._vocab = bench.options, bench.shape.vocab
        self._rng = random.Random(0)
        self.tokens: list[int] = []  # of each batch, with prompts

    def prompts(self) -> list[str]:
        """Return prompts for all steps."""
        options = self._options
        count = (options.warm_up + options.steps) * options.batch // options.group
        drawn = random_prompts(count, self._vocab, options.prompt_tokens, 0)
        return [" ".join(f"t{i}" for i in ids) for ids in drawn]

    def sync_weights(self) -> None:
        """Do nothing: no server needs them."""

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Any:
        """Return what TRL's `VLLMGeneration.generate` does."""
        options, rng = self._options, self._rng
        lengths = [min(options.tokens, 1 + int(rng.expovariate(1 / options.mean_tokens))) for _ in prompts]
        completions = [[rng.randrange(3, self._vocab) for _ in range(n)] for n in lengths]
        logprobs = [[[-math.log(self._vocab)] for _ in ids] for ids in completions]
        self.tokens.append(sum(map(len, prompts)) + sum(lengths))
        return prompts, completions, logprobs, [[[i] for i in ids] for ids in completions]


class _Watch(TrainerCallback):
    """Seconds of each step, and of its scoring without gradient, to the end of the device's work."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.steps: list[tuple[float, float]] = []
        self._device, self._score_s, self._started = trainer.args.device, 0.0, 0.0
        generate = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            wait_for(self._device)
            started = time.perf_counter()
            batch = generate(inputs)
            wait_for(self._device)
            self._score_s = time.perf_counter() - started
            return batch

        trainer._generate_and_score_completions = timed

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for(self._device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for(self._device)
        self.steps.append((time.perf_counter() - self._started, self._score_s))


if __name__ == "__main__":
    sys.exit(LearnerBench().main())
