"""One training of `bench.step`, in a process of its own: seconds and tokens of each of its steps.

python -m bench.step.learner TRAINING.json STEPS.json

A training has the options of `bench.step` and, by `StepBench.train`: folder, vocab, dtype, url of the server,
max_staleness (None: TRL's own server mode), asynchronous (TRL's asynchronous trainer in place of ours), share_gpu,
compile, stop_token_ids, output, and a file for a profile or None.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOTrainer

from bench.common.load import random_prompts
from bench.common.models import peak_gib, wait_for
from bench.common.report import timed
from bench.common.training import grpo_config, lora_config, odd_tokens
from bench.contenders import trl_asynchronous
from bench.contenders.lockstep import train_with_rollouts
from bench.contenders.trl_merged_weights import send_copies
from bench.step.figures import Step
from learner.utils.ports import free_port

PROFILE_LINES = 40


def max_steps(training: Namespace) -> int:
    """Return the number of steps, with those at the end for which nothing is generated ahead any more."""
    at_the_end = 0 if training.asynchronous else training.max_staleness or 0
    return training.warm_up + training.steps + (1 if training.profile else 0) + at_the_end


def counted(training: Namespace, steps: Sequence[Any]) -> Sequence[Any]:
    """Return the steps that count."""
    return steps[training.warm_up : training.warm_up + training.steps]


def make_prompts(training: Namespace) -> list[str]:
    """Return prompts of random words, a different one for every group, the same for every training."""
    # As many as the longest training of a run needs: which of them come first must not depend on the staleness.
    count = (training.warm_up + training.steps + 8) * (training.batch // training.group)
    return [" ".join(f"t{i}" for i in ids) for ids in random_prompts(count, training.vocab, training.prompt_tokens, 0)]


def make_asynchronous(training: Namespace, callback: TrainerCallback) -> Any:
    """Return TRL's asynchronous trainer."""

    def make_args(kind: type[Any]) -> Any:
        return grpo_config(
            training,
            kind=kind,
            output=training.output,
            cpu=not torch.cuda.is_available(),
            dtype=training.dtype,
            max_steps=max_steps(training),
            micro_batch=min(training.batch, training.packed_micro_batch),
            checkpointing=training.checkpointing,
            model_init_kwargs={"dtype": training.dtype},
            temperature=1.0,
            max_staleness=training.max_staleness,
            token_budget=0,  # else its steps would not all have the same number of completions
            vllm_server_base_url=training.url,
            logging_steps=1,
        )

    return trl_asynchronous.make_trainer(
        training.folder,
        make_args,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(training.folder),
        dataset=Dataset.from_dict({"prompt": make_prompts(training)}),
        reward_funcs=odd_tokens,
        peft_config=lora_config(training.rank),
        callback=callback,
    )


def make_trainer(training: Namespace, callback: TrainerCallback) -> GRPOTrainer:
    """Return a GRPOTrainer; ours and TRL's server mode differ in `use_vllm` only."""
    own_vllm: dict[str, Any] = {}
    if training.max_staleness is None:
        own_vllm = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": training.url}
        own_vllm["vllm_group_port"] = free_port()
        own_vllm["checkpointing"] = training.checkpointing
    args = grpo_config(
        training,
        output=training.output,
        cpu=not torch.cuda.is_available(),
        dtype=training.dtype,
        max_steps=max_steps(training),
        model_init_kwargs={"dtype": training.dtype},
        temperature=1.0,
        generation_kwargs={"stop_token_ids": training.stop_token_ids},
        **own_vllm,
    )
    # Not AutoTokenizer, which gives some model types a pre-tokenizer of their own: a word must be one token.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(training.folder)
    return GRPOTrainer(
        model=training.folder,
        processing_class=tokenizer,
        args=args,
        reward_funcs=odd_tokens,
        peft_config=lora_config(training.rank),
        callbacks=[callback],
        train_dataset=Dataset.from_dict({"prompt": make_prompts(training)}),
    )


class StepWatch(TrainerCallback):
    """Ends a step when its device has done it, and profiles one if asked. Comes before all other callbacks."""

    def __init__(self, training: Namespace) -> None:
        self.training = training
        self.profiler: torch.profiler.profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training.profile and state.global_step == self.training.warm_up + self.training.steps:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for(args.device)  # else the push, or TRL's merge, would be charged with the last backward pass
        if self.profiler is not None:
            self.profiler.stop()
            order = "self_device_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=order, row_limit=PROFILE_LINES)
            Path(str(self.training.profile)).write_text(table)
            self.profiler = None


class TrlWatch(TrainerCallback):
    """Times TRL's server mode as `learner.step_metrics` does ours: from the end of a step to the end of the next."""

    def __init__(self, generation: Any) -> None:
        self.steps: list[Step] = []
        self._started = time.perf_counter()
        self._wait_s = self._sync_s = 0.0
        self._tokens = 0
        send_copies(generation)
        generate, sync = generation.generate, generation.sync_weights

        def timed_generate(*args: Any, **options: Any) -> Any:
            answer, seconds = timed(lambda: generate(*args, **options))
            self._wait_s += seconds
            self._tokens += sum(map(len, answer[1]))
            return answer

        def timed_sync() -> None:
            self._sync_s += timed(sync)[1]

        generation.generate, generation.sync_weights = timed_generate, timed_sync

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        seconds = now - self._started
        # It generates only while the trainer waits.
        self.steps.append(Step(seconds, self._wait_s, self._sync_s, seconds - self._wait_s, self._tokens))
        self._started, self._wait_s, self._sync_s, self._tokens = now, 0.0, 0.0, 0


class AsynchronousWatch(TrainerCallback):
    """Times TRL's asynchronous trainer, from the end of a step to the end of the next, by what it logs of each step.

    Attributes:
        completions: that were trained on, in all steps.
        dropped: completions that had become too old.
        lag: the most pushes that one was behind when it was taken.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.completions = self.dropped = self.lag = 0
        self._started = time.perf_counter()

    @property
    def known(self) -> dict[str, int]:
        """What is known besides the steps."""
        return {"dropped": self.dropped, "lag": self.lag, "completions": self.completions}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._started = now - self._started, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "perf/rollout_wait_s" not in logs:  # the training's own summary
            return
        self.dropped += int(logs.get("sample/dropped_stale_total") or 0)
        self.lag = max(self.lag, int(logs["sample/staleness_max"]))
        self.completions += round(logs["batch/samples_per_step"])
        wait, sync = logs["perf/rollout_wait_s"], logs["perf/weight_sync_s"]
        tokens = round(logs["batch/trained_tokens_per_step"])
        self.steps.append(Step(self._seconds, wait, sync, None, tokens))


def train(training: Namespace) -> dict[str, Any]:
    """Train; return the counted steps, and what else is known of them."""
    first, known = StepWatch(training), dict[str, Any]()
    if training.asynchronous:
        peer = make_asynchronous(training, first)
        logged = AsynchronousWatch()
        peer.add_callback(logged)
        peer.train()
        steps, known = logged.steps, logged.known
    elif training.max_staleness is None:
        trainer = make_trainer(training, first)
        watch = TrlWatch(trainer.vllm_generation)
        trainer.add_callback(watch)
        trainer.train()
        steps = watch.steps
    else:
        trainer = make_trainer(training, first)
        options = {"max_staleness": training.max_staleness, "share_gpu": training.share_gpu}
        options |= {"compile": training.compile, "max_tokens_per_pass": training.pass_tokens or None}
        found, known = train_with_rollouts(trainer, training.url, **options)
        steps = [Step(*one) for one in found]
    return {"steps": [asdict(step) for step in counted(training, steps)], **known, **peak_gib()}


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    gc.freeze()  # as in `learner train`: full collections would walk over the imports, up to half a second each
    answered.write_text(json.dumps(train(Namespace(**json.loads(asked.read_text())))))
