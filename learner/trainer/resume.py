"""Exact resume under a `trl.GRPOTrainer`: save and restore the state that its own checkpoints leave out.

Left out are: where in a generation batch the training stands, the batch itself, the order of later epochs (TRL's
sampler draws it from a new generator), and under FSDP2 the adapter, for which no name is the expected one once
activation checkpointing has wrapped the layers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
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

logger = logging.getLogger("lockstep.trainer")


def resume_exactly(trainer: GRPOTrainer, session: Session) -> None:
    """Wrap the trainer's methods that write and read checkpoints."""
    samplers: list[IndexSampler] = []
    make_sampler, save = trainer._get_train_sampler, trainer._save_checkpoint
    load = trainer._load_optimizer_and_scheduler

    def remembered_sampler(*args: Any) -> IndexSampler:
        samplers.append(make_sampler(*args))
        return samplers[-1]

    def load_with_state(checkpoint: str | None) -> None:
        # Called by transformers after the model, and before the first step.
        load(checkpoint)
        if checkpoint is not None:
            _restore(trainer, session, checkpoint, samplers)

    trainer._get_train_sampler = remembered_sampler
    trainer._save_checkpoint = lambda model, trial: _save(trainer, session, partial(save, model, trial))
    trainer._load_optimizer_and_scheduler = load_with_state


def _save(trainer: GRPOTrainer, session: Session, save: Callable[[], None]) -> None:
    """Write transformers' checkpoint under another name and our state beside it, then rename it."""
    output_dir, writes = Path(trainer.args.output_dir), trainer.args.should_save
    staged = output_dir / STAGING / f"checkpoint-{trainer.state.global_step}"
    if writes:
        shutil.rmtree(staged.parent, ignore_errors=True)  # what a killed process may have left
    trainer.accelerator.wait_for_everyone()
    usual, trainer._get_output_dir = trainer._get_output_dir, lambda trial: str(staged.parent)
    try:
        save()
    finally:
        trainer._get_output_dir = usual
    staged.mkdir(parents=True, exist_ok=True)
    if trainer.is_fsdp_enabled:
        save_adapter(session.model, staged, writes=writes)
    schedule = schedule_of(trainer)
    if schedule.next_batch(trainer._step) != schedule.batch_at(trainer._step):  # within a generation batch
        save_batches(staged / _batch_file(trainer), trainer._buffered_inputs)
    trainer.accelerator.wait_for_everyone()
    counts = session.metrics.counts()
    _name_the_best(trainer, staged, output_dir)
    if writes:
        state = TrainingState(
            fence=session.publisher.lease.fence,
            step=trainer.state.global_step,
            micro_step=trainer._step,
            geometry=_geometry(trainer),
            **counts,
        )
        save_state(staged, state)
        commit(staged, output_dir / staged.name)
        transformers.trainer_utils.rotate_checkpoints(
            output_dir=str(output_dir),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


def _name_the_best(trainer: GRPOTrainer, staged: Path, output_dir: Path) -> None:
    """Correct the best checkpoint's path: transformers has looked for it beside the one being written."""
    state = trainer.state
    if not state.best_global_step:
        return
    best = output_dir / f"checkpoint-{state.best_global_step}"
    if best.is_dir() or best.name == staged.name:
        state.best_model_checkpoint = str(best)
        if trainer.args.should_save:
            state.save_to_json(str(staged / transformers.trainer.TRAINER_STATE_NAME))


def _restore(trainer: GRPOTrainer, session: Session, checkpoint: str, samplers: list[IndexSampler]) -> None:
    folder = Path(checkpoint)
    state = load_state(folder)
    if state is None:
        logger.warning(
            f"{checkpoint} was not written by Lockstep: it does not say where in a generation batch it stands, nor "
            "in which order later epochs come, so the training continues from its weights but not exactly"
        )
        return
    now = _geometry(trainer)
    changed = [f"{name}={now[name]} instead of {was}" for name, was in state.geometry.items() if now[name] != was]
    if changed:
        raise InvalidRequest(
            f"{checkpoint} was written with batches arranged otherwise: {', '.join(changed)}; resume with the same "
            "options, or start a new run from its adapter with --init_adapter"
        )
    if trainer.is_fsdp_enabled:
        load_adapter(session.model, folder)
    trainer._step = state.micro_step
    batch_file = folder / _batch_file(trainer)
    trainer._buffered_inputs = load_batches(batch_file, trainer.accelerator.device) if batch_file.is_file() else None
    if indexable(trainer):  # transformers itself reads a stream up to its place
        skip_epochs(samplers[-1], schedule_of(trainer).epoch_at(state.step))
    session.metrics.restore(state.pushes, state.completions, state.completion_tokens)


def _geometry(trainer: GRPOTrainer) -> dict[str, int]:
    args = trainer.args
    return {
        "num_processes": trainer.accelerator.num_processes,
        "generation_batch_size": args.generation_batch_size,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": trainer.num_iterations,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }


def _batch_file(trainer: GRPOTrainer) -> str:
    return f"generation_batch_{trainer.accelerator.process_index}.safetensors"


def save_batches(path: Path, batches: list[dict[str, Any]]) -> None:
    """Write the micro-batches of a generation batch.

    Args:
        batches: one dict of tensors (or None) for each micro-batch.

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
    """Load what `save_batches` wrote, onto `device`."""
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        batches.setdefault(int(index), {})[name] = tensor.to(device)
    return [batches[index] for index in sorted(batches)]
