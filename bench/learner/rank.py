"""One rank of a training of `bench.learner`, in a process of its own.

python -m bench.learner.rank TRAINING.json ANSWER.json UPDATES.safetensors

A training has the options of `bench.learner` and, by `LearnerBench.train`: row, ranks, folder, vocab, dtype, output.
One of several ranks finds the variables of torchrun. Rank 0 writes the answer, and the updates: the matrices B, which
were zero before the training.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOTrainer

from bench.common.load import random_prompts
from bench.common.models import peak_gib, wait_for
from bench.common.sharding import fsdp2_on_cpu, fsdp2_on_gpus, zero3_on_cpu, zero3_on_gpus
from bench.common.training import grpo_config, lora_config, odd_tokens
from bench.learner.rows import COMPILED, CUT, DDP, FSDP2, PLAIN, PRODUCT, SHARDED, ZERO3
from learner.adapters.exporter import active_adapter
from learner.passes.compiled import CompiledLayers
from learner.passes.flops import multiplied_weights, peak_flops
from learner.passes.lora_product import use_one_product
from learner.rollouts.generation import RemoteRollouts
from learner.trainer.compiling import compile_layers
from learner.trainer.hooks import generate_with
from learner.trainer.packed_scoring import PackedScoring, score_packed
from learner.trainer.padding import cut_passes, sort_rows
from learner.utils.distributed import full_tensor, gathered

#: AdamW with this epsilon makes updates that are proportional to gradients. With the usual one it divides by their
#: size, and elements whose gradient is but rounding differ between any two trainings.
LINEAR = {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 0.5}


class Rollouts:
    """Completions of random tokens with geometric lengths, in place of a rollout server; the same for every training.

    Args:
        rank: of how many the training has; it is asked for its share of a batch.
    """

    def __init__(self, training: Namespace, rank: int) -> None:
        self._options, self._rank = training, rank
        self.tokens: list[int] = []  # of this rank's share of each batch, with prompts

    def prompts(self) -> list[str]:
        """Return prompts for all steps."""
        options = self._options
        count = (options.warm_up + options.steps) * options.batch // options.group
        drawn = random_prompts(count, options.vocab, options.prompt_tokens, 0)
        return [" ".join(f"t{i}" for i in ids) for ids in drawn]

    def sync_weights(self) -> None:
        """Do nothing: no server needs them."""

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Any:
        """Return what TRL's `VLLMGeneration.generate` does."""
        batch, first = len(self.tokens), self._rank * len(prompts)
        completions = [self._completion(random.Random(f"{batch} {first + i}")) for i in range(len(prompts))]
        logprobs = [[[-math.log(self._options.vocab)] for _ in ids] for ids in completions]
        self.tokens.append(sum(map(len, prompts)) + sum(map(len, completions)))
        return prompts, completions, logprobs, [[[i] for i in ids] for ids in completions]

    def _completion(self, rng: random.Random) -> list[int]:
        length = min(self._options.tokens, 1 + int(rng.expovariate(1 / self._options.mean_tokens)))
        return [rng.randrange(3, self._options.vocab) for _ in range(length)]


class Watch(TrainerCallback):
    """Seconds of each step, and of its scoring without gradient, to the end of the device's work; memory from the first
    step on.
    """

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():  # what loading needed is none of a step's
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for(self._device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for(self._device)
        self.steps.append((time.perf_counter() - self._started, self._score_s))


def make_trainer(training: Namespace, rollouts: Rollouts) -> GRPOTrainer:
    """Return a GRPOTrainer of the row, whose passes are TRL's own still."""
    row, cpu = training.row, not torch.cuda.is_available()
    sharding: dict[str, Any] = {}
    if row == ZERO3:
        sharding = zero3_on_cpu(bf16=False) if cpu else zero3_on_gpus()
    elif row == FSDP2 and not cpu:
        sharding = fsdp2_on_gpus()
    trainer = GRPOTrainer(
        model=training.folder,
        # Not AutoTokenizer, which gives some model types a pre-tokenizer of their own: a word must be one token.
        processing_class=PreTrainedTokenizerFast.from_pretrained(training.folder),
        args=grpo_config(
            training,
            output=training.output,
            cpu=cpu and row != ZERO3,
            dtype=training.dtype,
            max_steps=training.warm_up + training.steps,
            micro_batch=training.sharded_micro_batch if row in SHARDED else training.micro_batch,
            ranks=training.ranks,
            checkpointing=training.checkpointing and row in (PLAIN, CUT),
            **{"model_init_kwargs": {"dtype": training.dtype}, **LINEAR, **sharding},
        ),
        reward_funcs=odd_tokens,
        peft_config=lora_config(training.rank),
        train_dataset=Dataset.from_dict({"prompt": rollouts.prompts()}),
    )
    if row == FSDP2 and cpu:
        fsdp2_on_cpu(trainer)
    generate_with(trainer, cast(RemoteRollouts, rollouts))
    return trainer


def use_passes(trainer: GRPOTrainer, training: Namespace) -> tuple[PackedScoring | None, CompiledLayers | None]:
    """Let the trainer make its passes as the row wants them; return what packs them, and the layers that are compiled.

    Raises:
        RuntimeError: passes of this model cannot be packed here.
    """
    row, packed = training.row, None
    if row in (PRODUCT, COMPILED, DDP):
        use_one_product(trainer.model, active_adapter(trainer.model))
    if row == CUT:
        cut_passes(trainer)
        sort_rows(trainer)
    elif row != PLAIN:
        packed = score_packed(trainer, training.pass_tokens or None)
        if packed is None:
            raise RuntimeError("the passes of this model cannot be packed here")
    compiles = row == COMPILED or (row == DDP and torch.cuda.is_available())
    return packed, compile_layers(trainer, "on", lambda: math.nan) if compiles else None


def updates(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """Return the matrices B, float32, on every rank. Collective."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Checkpointed layers are wrapped under FSDP2.
    names = ((name.replace("_checkpoint_wrapped_module.", ""), each) for name, each in model.named_parameters())
    parameters = {name: parameter for name, parameter in names if "lora_B" in name}
    with gathered(list(parameters.values())):
        return {name: full_tensor(each.detach()).float().cpu().clone() for name, each in parameters.items()}


def train(training: Namespace, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train; return what rank 0 answers, and the updates."""
    rollouts = Rollouts(training, rank)
    trainer = make_trainer(training, rollouts)
    packed, layers = use_passes(trainer, training)
    weights, peak = multiplied_weights(trainer.model), peak_flops(trainer.args.device)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    if layers and not layers.active:
        raise RuntimeError("the layers could not be compiled; the log says why")
    ranks = gather_object([{"tokens": rollouts.tokens, "memory": peak_gib()}])
    answer = {
        "steps": watch.steps,
        "tokens": [sum(shares) for shares in zip(*(each["tokens"] for each in ranks), strict=True)],
        "memory": [each["memory"] for each in ranks],
        "weights": weights,
        "scores_apart": packed is None or packed.scores_apart,
        "peak_flops": peak and peak * len(ranks),
        "model": type(trainer.model_wrapped).__name__,
        "fsdp_units": sum(isinstance(module, FSDPModule) for module in trainer.model.modules()),
    }
    return answer, updates(trainer)


if __name__ == "__main__":
    asked, answered, matrices = map(Path, sys.argv[1:])
    own_rank = int(os.environ.get("RANK", "0"))
    answer, adapter = train(Namespace(**json.loads(asked.read_text())), own_rank)
    if own_rank == 0:
        save_file(adapter, matrices)
        answered.write_text(json.dumps(answer))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
