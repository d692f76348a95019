"""How much of what a LoRA adapter has learned reaches the logprobs in bfloat16, by the way its layers are computed.

python -m bench.small_updates --steps 5,20 --learning-rate 1e-5 --json small_updates.json      # CPU, the demo's model

An adapter is trained in float32 over the bfloat16 base, by AdamW on sums. On other sums, the movement of all tokens'
logprobs since the base in bfloat16 is regressed on that in float32: a share of 1 where all of it arrives.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.common.harness import Bench
from learner.adapters.exporter import active_adapter, lora_layers
from learner.demo.model import ensure_demo_model
from learner.passes.lora_product import use_one_product

Weights = dict[str, torch.Tensor]
ROUNDED, ADDED, MERGED = "A and B rounded, all else float32", "PEFT under autocast", "merged, rounded to nearest"
PRODUCT = "one product, one rounding"


class SmallUpdatesBench(Bench):
    """Shares of an adapter's movement, a row for each number of steps and way of computing."""

    name = "small_updates"
    standard = "rank only deadline-s"
    row_names = (ROUNDED, ADDED, MERGED, PRODUCT)
    flags = {
        "--rank": (16, "of the adapter"),
        "--steps": ("5,20", "optimizer steps after which to look, comma-separated"),
        "--learning-rate": (1e-5, ""),
        "--batch": (4, "sums of a step"),
        "--probes": (64, "sums that logprobs are compared on"),
    }
    quick = "--steps 1 --probes 2"
    same = "rank", "learning_rate", "batch", "probes"
    figure = "share"
    about = {"steps": "steps", "row": "row"}
    columns = {"true rms": "{true_rms:.3f}", "share": "{share:.3f}", "relative error": "{error:.3g}"}
    what = "{row} after {steps} steps"
    told = "share {share:.3f}, relative error {error:.3g}"

    def check(self) -> None:
        super().check()
        self.numbers("steps")
        self.at_least(1, "steps", "batch", "probes")

    def run(self) -> None:
        folder, rank = ensure_demo_model(), self.options.rank
        sums = _Sums(AutoTokenizer.from_pretrained(folder))
        probes = [sums.draw() for _ in range(self.options.probes)]
        exact, rounded = (_policy(folder, dtype, rank) for dtype in (torch.float32, torch.bfloat16))
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with exact.disable_adapter(), rounded.disable_adapter():
            bases = {torch.float32: _logprobs(exact, probes), torch.bfloat16: _logprobs(rounded, probes)}
        snapshots = self.train(exact, sums)
        true = {steps: self.moved(exact, at, probes, bases) for steps, at in snapshots.items()}

        def merged(at: Weights) -> np.ndarray:
            _merge(plain, rounded, at)
            return _logprobs(plain, probes) - bases[torch.bfloat16]

        ways: dict[str, Callable[[Weights], np.ndarray]] = {
            ROUNDED: lambda at: self.moved(exact, _in_bfloat16(at), probes, bases),
            ADDED: lambda at: self.moved(rounded, at, probes, bases),
            MERGED: merged,
            PRODUCT: lambda at: self.moved(rounded, at, probes, bases),
        }
        for row in [name for name in ways if name in self.options.only]:
            if row == PRODUCT:
                use_one_product(rounded, active_adapter(rounded))
            for steps, at in snapshots.items():
                about = self.about_row(row, steps=steps)
                with self.failure_kept(about):
                    self.in_time()
                    self.add(about, _compared(ways[row](at), true[steps]))

    def train(self, policy: PeftModel, sums: _Sums) -> dict[int, Weights]:
        """Train; return the adapter after each number of steps that is asked for."""
        weights = _adapter(policy)
        optimizer = torch.optim.AdamW(list(weights.values()), lr=self.options.learning_rate, weight_decay=0.0)
        snapshots = {}
        for step in range(1, max(self.options.steps) + 1):
            for _ in range(self.options.batch):
                ids = torch.tensor([sums.draw()])
                (policy(input_ids=ids, labels=ids).loss / self.options.batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in self.options.steps:
                snapshots[step] = {name: weight.detach().clone() for name, weight in weights.items()}
        return snapshots

    def moved(
        self, policy: PeftModel, at: Weights, probes: list[list[int]], bases: dict[Any, np.ndarray]
    ) -> np.ndarray:
        """Return how far the probes' logprobs are from those of the base in the same arithmetic."""
        with torch.no_grad():
            for name, weight in _adapter(policy).items():
                weight.copy_(at[name])
        return _logprobs(policy, probes) - bases[policy.get_base_model().dtype]


class _Sums:
    """One-line sums as chats."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._random = tokenizer, random.Random(0)

    def draw(self) -> list[int]:
        """Return the token ids of the next one."""
        a, b = (self._random.randint(0, 99) for _ in range(2))
        chat = [{"role": "user", "content": f"{a} + {b} ="}, {"role": "assistant", "content": str(a + b)}]
        return list(self._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"])


def _policy(folder: Any, dtype: torch.dtype, rank: int) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval()


def _adapter(policy: PeftModel) -> Weights:
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def _in_bfloat16(at: Weights) -> Weights:
    # The scaling is 2, so B's grid is that of scaled B.
    return {name: weight.bfloat16().float() for name, weight in at.items()}


def _merge(plain: nn.Module, policy: PeftModel, at: Weights) -> None:
    """Write base and adapter into `plain`, rounded to nearest."""
    adapter = active_adapter(policy)
    names = {id(weight): name for name, weight in _adapter(policy).items()}
    with torch.no_grad():
        for name, layer in lora_layers(policy, adapter).items():
            a, b = (at[names[id(side[adapter].weight)]] for side in (layer.lora_A, layer.lora_B))
            weight = layer.get_base_layer().weight.float() + b @ a * layer.scaling[adapter]
            plain.get_submodule(name).weight.copy_(weight)


@torch.no_grad()
def _logprobs(model: nn.Module, probes: list[list[int]]) -> np.ndarray:
    """Return the logprobs of all tokens but the first; a bfloat16 model computes under autocast, as in training."""
    found = []
    for sequence in probes:
        ids = torch.tensor([sequence])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(torch.log_softmax(logits.double(), -1).gather(-1, ids[0, 1:, None])[:, 0].numpy())
    return np.concatenate(found)


def _compared(moved: np.ndarray, true: np.ndarray) -> dict[str, float]:
    return {
        "true_rms": float(np.sqrt(np.mean(true**2))),
        "share": float(moved @ true / (true @ true)),
        "error": float(np.linalg.norm(moved - true) / np.linalg.norm(true)),
    }


if __name__ == "__main__":
    sys.exit(SmallUpdatesBench().main())
