"""What must hold of a training that has ended, however it was disturbed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas
import torch
from safetensors.torch import load, load_file

from learner.adapters.stored import PEFT_PREFIX
from shared.adapter_file import LORA_A
from tests.chaos.world import BATCH, PROMPTS, World


def check(world: World) -> None:
    """Steps, prompts, adapter, and what is left behind."""
    require, steps, summary = world.checker.require, world.options.steps, world.summary()
    require("steps", summary["steps"] == summary["pushes"] == steps, f"{summary} instead of {steps} steps and pushes")
    require(
        "I6",
        set(summary["lags"]) <= {str(lag) for lag in range(world.options.staleness + 1)},
        f"lags {summary['lags']}",
    )
    _prompts(world)
    _adapter(world)
    for invariant in ("I1", "I2", "I3", "I4", "I5", "I6"):
        require("checks", world.checker.checks.get(invariant, 0) >= steps // 4, f"{invariant} was hardly ever checked")


def same_bytes(world: World) -> None:
    """A deterministic training that was disturbed ends with the bytes of one that was not."""
    name = Path("adapter", "adapter_model.safetensors")
    disturbed = (world.output / name).read_bytes()
    world.checker.require("same bytes", (world.undisturbed() / name).read_bytes() == disturbed, "the adapters differ")


def _prompts(world: World) -> None:
    """I5, by what TRL says it trained on: a file for each step, written again where a step was made again."""
    require, epoch = world.checker.require, PROMPTS // BATCH
    trained = {}
    for step in range(1, world.options.steps + 1):
        path = world.output / "completions" / f"completions_{step:05d}.parquet"
        trained[step] = Counter(_prompts_of(path)) if path.is_file() else Counter()
        sizes = sorted(trained[step].values())
        require("I5", sizes == [4] * BATCH, f"step {step} trained on groups of {sizes}")
    for first in range(1, world.options.steps + 1, epoch):
        last = min(first + epoch, world.options.steps + 1)
        seen = Counter(prompt for step in range(first, last) for prompt in trained[step])
        twice = [prompt for prompt, times in seen.items() if times > 1]
        require("I5", not twice, f"steps {first} to {last - 1} trained twice on {twice}")
        whole = last - first < epoch or len(seen) == PROMPTS
        require("I5", whole, f"steps {first} to {last - 1} trained on {len(seen)} of {PROMPTS} prompts")


def _prompts_of(path: Path) -> list[str]:
    """The prompt of each completion; a conversation as its text."""
    prompts = pandas.read_parquet(path)["prompt"]
    return [p if isinstance(p, str) else "\n".join(message["content"] for message in p) for p in prompts]


def _adapter(world: World) -> None:
    """The final adapter can be read, is finite, and is what was pushed last."""
    final = load_file(world.output / "adapter" / "adapter_model.safetensors")
    world.checker.require("adapter", all(bool(t.isfinite().all()) for t in final.values()), "it is not finite")
    (_, step), blob = world.newest()
    pushed = {name: tensor for name, tensor in load(blob).items() if name.endswith(LORA_A)}
    same = all(torch.equal(final[PEFT_PREFIX + name], tensor) for name, tensor in pushed.items())
    right = step == world.options.steps and bool(pushed) and same
    world.checker.require("adapter", right, f"it is not what was pushed last, as step {step}")
