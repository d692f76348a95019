"""One training of `bench.step`, in a process of its own: what each of its steps took.

python -m bench.step.learner TRAINING.json STEPS.json
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.common.policy import wait_for
from bench.common.servers import free_port
from bench.step.figures import Step
from learner.trainer.attach import attach

#: Small, so that the lengths of completions stay what they are. Every weight of the adapter still changes.
LEARNING_RATE = 1e-6
PROFILE_LINES = 40


@dataclass(frozen=True)
class Training:
    """What to train, and against which server.

    Attributes:
        max_staleness: of ours; None: TRL's own server mode.
        batch: completions of an optimizer step, which is one generation batch.
        group: completions of a prompt.
        micro_batch: completions of a forward-backward pass.
        tokens: the most that a completion has.
        stop_token_ids: what ends a completion before.
        steps, warm_up: that are counted, and that come before these.
        profile: a file for the profile of a further step.
        share_gpu: the server sleeps while the learner trains.
    """

    folder: str
    url: str
    max_staleness: int | None
    vocab: int
    dtype: str
    rank: int
    batch: int
    group: int
    micro_batch: int
    prompt_tokens: int
    tokens: int
    stop_token_ids: list[int]
    steps: int
    warm_up: int
    output: str
    profile: str | None = None
    share_gpu: bool = False

    @property
    def max_steps(self) -> int:
        """With those at the end for which nothing is generated ahead any more; they are not counted."""
        return self.warm_up + self.steps + (1 if self.profile else 0) + (self.max_staleness or 0)

    def counted(self, steps: list[Step]) -> list[Step]:
        """The steps that count."""
        return steps[self.warm_up : self.warm_up + self.steps]


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and does not depend on lengths: the share of odd token ids."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def make_prompts(training: Training) -> list[str]:
    """Prompts of random words, a different one for every group of the training, the same for every training."""
    rng = random.Random(0)
    # As many as the longest training of a run needs: which of them come first must not depend on the staleness.
    count = (training.warm_up + training.steps + 8) * (training.batch // training.group)
    return [
        " ".join(f"t{rng.randrange(3, training.vocab)}" for _ in range(training.prompt_tokens)) for _ in range(count)
    ]


def make_trainer(training: Training, callback: TrainerCallback) -> GRPOTrainer:
    """A GRPOTrainer; ours and TRL's server mode differ in `use_vllm` only."""
    own_vllm: dict[str, Any] = {}
    if training.max_staleness is None:
        own_vllm = {
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": training.url,
            "vllm_group_port": free_port(),
        }
    args = GRPOConfig(
        output_dir=training.output,
        use_cpu=not torch.cuda.is_available(),
        bf16=training.dtype == "bfloat16",
        model_init_kwargs={"dtype": training.dtype},
        gradient_checkpointing=False,
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.batch // training.micro_batch,
        num_generations=training.group,
        max_completion_length=training.tokens,
        temperature=1.0,
        generation_kwargs={"stop_token_ids": training.stop_token_ids},
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=training.max_steps,
        seed=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own_vllm,
    )
    lora = LoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    # Not AutoTokenizer, which gives some model types a pre-tokenizer of their own: a word must be one token.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(training.folder)
    return GRPOTrainer(
        model=training.folder,
        processing_class=tokenizer,
        args=args,
        reward_funcs=odd_tokens,
        peft_config=lora,
        callbacks=[callback],
        train_dataset=Dataset.from_dict({"prompt": make_prompts(training)}),
    )


class StepWatch(TrainerCallback):
    """Ends a step when its device has done it, and profiles one if asked. Comes before all other callbacks."""

    def __init__(self, training: Training) -> None:
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
    """Times TRL's own server mode as `learner.step_metrics` does ours: from the end of a step to the end of the next."""

    def __init__(self, generation: Any) -> None:
        self.steps: list[Step] = []
        self._started = time.perf_counter()
        self._wait_s = self._sync_s = 0.0
        self._tokens = 0
        generate, sync = generation.generate, generation.sync_weights

        def timed_generate(*args: Any, **options: Any) -> Any:
            answer, seconds = _timed(lambda: generate(*args, **options))
            self._wait_s += seconds
            self._tokens += sum(map(len, answer[1]))
            return answer

        def timed_sync() -> None:
            _, seconds = _timed(sync)
            self._sync_s += seconds

        generation.generate, generation.sync_weights = timed_generate, timed_sync

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.steps.append(Step(now - self._started, self._wait_s, self._sync_s, None, self._tokens))
        self._started, self._wait_s, self._sync_s, self._tokens = now, 0.0, 0.0, 0


def train(training: Training) -> dict[str, Any]:
    """Train; the counted steps, and what else is known of them."""
    trainer = make_trainer(training, StepWatch(training))
    if training.max_staleness is None:
        watch = TrlWatch(trainer.vllm_generation)
        trainer.add_callback(watch)
        trainer.train()
        return {"steps": [asdict(step) for step in training.counted(watch.steps)]}
    session = attach(
        trainer, training.url, max_staleness=training.max_staleness, proof_canary=False, share_gpu=training.share_gpu
    )
    trainer.train()
    session.close()
    session.publisher.delete_run()
    reports = session.metrics.reports
    before = [0, *(report.completion_tokens for report in reports)]  # counted since the start
    steps = [
        Step(r.seconds, r.wait_seconds, r.push_seconds, r.idle_seconds, r.completion_tokens - earlier)
        for r, earlier in zip(reports, before, strict=False)
    ]
    summary = session.summary()
    return {
        "steps": [asdict(step) for step in training.counted(steps)],
        "transport": session.publisher.receipts[-1].transport,
        "turn_s": session.gpu_sharing.seconds if session.gpu_sharing else [],
        "learner_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
        **{name: summary[name] for name in ("lags", "regenerated", "max_logprob_gap", "max_drift_kl")},
    }


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - started


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(train(Training(**json.loads(asked.read_text())))))
