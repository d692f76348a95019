"""Checks of a training that has ended: steps, prompts, final adapter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas
import torch
from safetensors.torch import load, load_file

from learner.adapters.stored import PEFT_PREFIX
from shared.adapter_file import LORA_A
from tests.chaos.world import BATCH, PROMPTS, Training, World


def check(world: Training) -> None:
    """Check steps, staleness, prompts, the adapter, and how often invariants were checked."""
    require, steps, summary = world.checker.require, world.options.steps, world.summary()
    require("steps", summary["steps"] == summary["pushes"] == steps, f"{summary} instead of {steps} steps and pushes")
    require(
        "I6",
        set(summary["lags"]) <= {str(lag) for lag in range(world.options.staleness + 1)},
        f"lags {summary['lags']}",
    )
    if world.options.broadcast:
        require(
            "broadcasts", world.broadcasts() >= steps // 10, f"{world.broadcasts()} of {steps} pushes were broadcast"
        )
    _prompts(world)
    _adapter(world)
    for invariant in ("I1", "I2", "I3", "I4", "I5", "I6"):
        require("checks", world.checker.checks.get(invariant, 0) >= steps // 4, f"{invariant} was checked too rarely")


def same_bytes(world: World) -> None:
    """Check that a disturbed deterministic training ends with the same bytes as an undisturbed one."""
    name = Path("adapter", "adapter_model.safetensors")
    disturbed = (world.output / name).read_bytes()
    world.checker.require("same bytes", (world.undisturbed() / name).read_bytes() == disturbed, "the adapters differ")


def _prompts(world: Training) -> None:
    """Check I5 with TRL's completion files: one for each step, overwritten if the step is repeated."""
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
        complete = last - first < epoch or len(seen) == PROMPTS
        require("I5", complete, f"steps {first} to {last - 1} trained on {len(seen)} of {PROMPTS} prompts")


def _prompts_of(path: Path) -> list[str]:
    """Return the prompt of each completion; the text of a conversation."""
    prompts = pandas.read_parquet(path)["prompt"]
    return [p if isinstance(p, str) else "\n".join(message["content"] for message in p) for p in prompts]


def _adapter(world: Training) -> None:
    """Check that the final adapter is readable, finite, and the one pushed last."""
    final = load_file(world.output / "adapter" / "adapter_model.safetensors")
    world.checker.require("adapter", all(bool(t.isfinite().all()) for t in final.values()), "it is not finite")
    (_, step), blob = world.newest()
    pushed = {name: tensor for name, tensor in load(blob).items() if name.endswith(LORA_A)}
    same = all(torch.equal(final[PEFT_PREFIX + name].to(tensor.dtype), tensor) for name, tensor in pushed.items())
    right = step == world.options.steps and bool(pushed) and same
    world.checker.require("adapter", right, f"it is not the one pushed last, as step {step}")
