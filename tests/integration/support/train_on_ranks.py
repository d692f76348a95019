"""A training script as a user would write it, for one rank or several; `test_ranks.py` launches it.

python -m torch.distributed.run --nproc_per_node 2 -m tests.integration.support.train_on_ranks \\
    MODEL URL FOLDER [fsdp2 | zero3] [bf16] [forget] [cut]

`cut` ends it when the checkpoint of step 2 has been written; the same command without `cut` resumes from there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.common.sharding import fsdp2_on_cpu, zero3_on_cpu
from learner.run_dir.checkpoint import last_checkpoint
from learner.session import Session
from learner.trainer.attach import attach, save_final_adapter
from tests.support.rewards import reward_odd

GLOBAL_BATCH, GROUP, STEPS, CUT = 8, 4, 3, 2


def make_trainer(model: str, folder: Path, options: list[str]) -> GRPOTrainer:
    """Make a trainer with the same global batch on any number of ranks, and TRL's defaults where possible."""
    zero, bf16 = "zero3" in options, "bf16" in options
    devices: dict[str, Any] = zero3_on_cpu(bf16=bf16) if zero else {"use_cpu": True}
    args = GRPOConfig(
        output_dir=str(folder),
        bf16=bf16,
        max_steps=STEPS,
        max_completion_length=16,
        per_device_train_batch_size=GLOBAL_BATCH // PartialState(cpu=not zero).num_processes,
        num_generations=GROUP,
        # Adam divides by the gradient's size, so elements whose gradient is only rounding noise would differ at once.
        # This large epsilon prevents that and keeps the momentum, which a resumed training must restore.
        optim="adamw_torch",
        adam_epsilon=1.0,
        learning_rate=0.5,
        max_grad_norm=0.5,
        beta=0.01,
        generation_kwargs={"seed": 7},
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps" if "cut" in options else "no",
        save_steps=CUT,
        **devices,
    )
    return GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[reward_odd],
        train_dataset=Dataset.from_list([{"prompt": f"{i} + {i + 3} ="} for i in range(16)]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def forget_once(session: Session) -> None:
    """Delete the run on the server before rank 1 requests the second batch, as if the server had restarted."""
    generate = session.rollouts.generate

    def generate_after_loss(*args: Any, **kwargs: Any) -> Any:
        if session.trainer.accelerator.process_index == 1 and session.trainer.step == 1:
            session.publisher.delete_run()
        return generate(*args, **kwargs)

    session.rollouts.generate = generate_after_loss


class Cut(TrainerCallback):
    """Ends every rank after a checkpoint, without the usual end of a training."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder

    def on_save(self, *args: Any, **_: Any) -> None:
        write_summary(self.session, self.folder)
        os._exit(0)


def write_summary(session: Session, folder: Path, **more: Any) -> None:
    summary = session.summary() | {"installs": [receipt.install_seq for receipt in session.publisher.receipts], **more}
    if session.trainer.accelerator.is_main_process:
        (folder / "summary.json").write_text(json.dumps(summary))


def main(model: str, url: str, folder: Path, options: list[str]) -> None:
    trainer = make_trainer(model, folder, options)
    if "fsdp2" in options:
        fsdp2_on_cpu(trainer)
    session = attach(trainer, url, takeover=True)  # the server is shared with other tests
    session.rollouts.dispatcher.rank = 0  # the seed of a completion must not depend on the number of ranks here
    if "forget" in options:
        forget_once(session)
    if "cut" in options:
        trainer.add_callback(Cut(session, folder))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    save_final_adapter(trainer, folder / "adapter")
    write_summary(session, folder, model_class=type(trainer.model_wrapped).__name__)
    if trainer.accelerator.is_main_process:
        session.publisher.delete_run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
