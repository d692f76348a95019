"""Exact resume under a `trl.GRPOTrainer`: what its own checkpoints leave out, saved and put back.

Left out are: where in a generation batch the training stands, the batch itself, the order of later epochs (TRL's
sampler draws it from a generator that starts anew), and under FSDP2 the adapter, for which no name is the expected one
once activation checkpointing has wrapped the layers. Relies on TRL's internals as `learner.trainer.attach` does, in the
same range of versions.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers.trainer_utils
from safetensors.torch import load_file, save_file
from trl import GRPOTrainer

from learner.adapters.peft_dir import load_adapter, save_adapter
from learner.run_dir.checkpoint import STAGING, TrainingState, commit, load_state, save_state
from learner.session import Session
from learner.trainer.prompt_order import IndexSampler, indexable, schedule_of, skip_epochs
from shared.errors import InvalidRequest


class ExactResume:
    """Wraps the trainer's methods that write and read checkpoints.

    Args:
        session: whose counts go on.
    """

    def __init__(self, trainer: GRPOTrainer, session: Session) -> None:
        self._trainer, self._session = trainer, session
        self._samplers: list[IndexSampler] = []
        self._make_sampler = trainer._get_train_sampler
        self._save = trainer._save_checkpoint
        self._load = trainer._load_optimizer_and_scheduler
        trainer._get_train_sampler = self._remembered_sampler
        trainer._save_checkpoint = self._save_whole
        trainer._load_optimizer_and_scheduler = self._load_with_state

    def _remembered_sampler(self, *args: Any) -> IndexSampler:
        self._samplers.append(self._make_sampler(*args))
        return self._samplers[-1]

    def _save_whole(self, model: Any, trial: Any) -> None:
        """transformers' checkpoint under another name, our state beside it, then the name."""
        trainer = self._trainer
        output_dir = Path(trainer.args.output_dir)
        staging, name = output_dir / STAGING, f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # what a killed process may have left
        trainer.accelerator.wait_for_everyone()
        usual, trainer._get_output_dir = trainer._get_output_dir, lambda trial: str(staging)
        try:
            self._save(model, trial)
        finally:
            trainer._get_output_dir = usual
        (staging / name).mkdir(parents=True, exist_ok=True)
        if trainer.is_fsdp_enabled:
            save_adapter(self._session.model, staging / name, writes=trainer.args.should_save)
        if self._in_a_batch():
            save_batches(staging / name / _batch_file(trainer), trainer._buffered_inputs)
        trainer.accelerator.wait_for_everyone()
        counts = self._session.figures.counts()
        self._name_the_best(staging / name, output_dir)
        if trainer.args.should_save:
            fence = self._session.publisher.lease.fence
            save_state(
                staging / name,
                TrainingState(
                    fence=fence,
                    step=trainer.state.global_step,
                    micro_step=trainer._step,
                    geometry=self._geometry(),
                    **counts,
                ),
            )
            commit(staging / name, output_dir / name)
            transformers.trainer_utils.rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=trainer.args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )
        trainer.accelerator.wait_for_everyone()

    def _name_the_best(self, staged: Path, output_dir: Path) -> None:
        """transformers has looked for the best checkpoint among those being written."""
        state = self._trainer.state
        if not state.best_global_step:
            return
        best = output_dir / f"checkpoint-{state.best_global_step}"
        if best.is_dir() or best.name == staged.name:
            state.best_model_checkpoint = str(best)
            if self._trainer.args.should_save:
                state.save_to_json(str(staged / transformers.trainer.TRAINER_STATE_NAME))

    def _load_with_state(self, checkpoint: str | None) -> None:
        """Called by transformers after the model, and before the first step."""
        self._load(checkpoint)
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint))
        if state is None:
            self._session.say(
                f"{checkpoint} was not written by Lockstep: it does not say where in a generation batch it stands, nor "
                "in which order later epochs come, so the training goes on from its weights but not exactly"
            )
            return
        self._check_geometry(state, checkpoint)
        trainer = self._trainer
        if trainer.is_fsdp_enabled:
            load_adapter(self._session.model, Path(checkpoint))
        trainer._step = state.micro_step
        batch_file = Path(checkpoint) / _batch_file(trainer)
        trainer._buffered_inputs = (
            load_batches(batch_file, trainer.accelerator.device) if batch_file.is_file() else None
        )
        if indexable(trainer):  # transformers itself reads a stream up to its place
            skip_epochs(self._samplers[-1], schedule_of(trainer).epoch_at(state.step))
        self._session.figures.restore(state.pushes, state.completions, state.completion_tokens)

    def _geometry(self) -> dict[str, int]:
        trainer, args = self._trainer, self._trainer.args
        return {
            "num_processes": trainer.accelerator.num_processes,
            "generation_batch_size": args.generation_batch_size,
            "steps_per_generation": args.steps_per_generation,
            "num_iterations": trainer.num_iterations,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }

    def _check_geometry(self, state: TrainingState, checkpoint: str) -> None:
        now = self._geometry()
        changed = [f"{name}={now[name]} instead of {was}" for name, was in state.geometry.items() if now[name] != was]
        if changed:
            raise InvalidRequest(
                f"{checkpoint} was written with batches arranged otherwise: {', '.join(changed)}; resume with the same "
                "options, or start a new run from its adapter with --init_adapter"
            )

    def _in_a_batch(self) -> bool:
        """Whether the next micro-step goes on with the present generation batch."""
        trainer = self._trainer
        return trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def _batch_file(trainer: GRPOTrainer) -> str:
    return f"generation_batch_{trainer.accelerator.process_index}.safetensors"


def save_batches(path: Path, batches: list[dict[str, Any]]) -> None:
    """Write the slices of a generation batch.

    Args:
        batches: one dict of tensors (or None) for each slice.

    Raises:
        LockstepError: `invalid_request` for anything but tensors.
    """
    tensors = {}
    for index, batch in enumerate(batches):
        for name, value in batch.items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise InvalidRequest(
                    f"{name} of a generation batch is no tensor and cannot be checkpointed: set save_steps to a "
                    "multiple of the optimizer steps per generation batch"
                )
            tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, path)


def load_batches(path: Path, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """What `save_batches` wrote, on `device`."""
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        batches.setdefault(int(index), {})[name] = tensor.to(device)
    return [batches[index] for index in sorted(batches)]
