"""Exact resume under a `trl.GRPOTrainer`: save and restore the state that its own checkpoints leave out.

This is the position in a generation batch, the batch itself, the order of later epochs (TRL's sampler draws it from a
new generator), and under FSDP2 the adapter, whose names change once activation checkpointing has wrapped the layers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
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
from learner.trainer.prompt_order import indexable, schedule_of, skip_epochs
from shared.errors import InvalidRequest

logger = logging.getLogger("lockstep.trainer")


def resume_exactly(trainer: GRPOTrainer, session: Session) -> None:
    """Wrap the trainer's methods that write and read checkpoints."""
    samplers: list[Iterable[int]] = []
    make_sampler, save = trainer._get_train_sampler, trainer._save_checkpoint
    load = trainer._load_optimizer_and_scheduler

    def remembered_sampler(*args: Any) -> Iterable[int]:
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
    output_dir, writes, trl_state = Path(trainer.args.output_dir), trainer.args.should_save, trainer.state
    staged = output_dir / STAGING / f"checkpoint-{trl_state.global_step}"
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
        _save_batches(staged / _batch_file(trainer), trainer._buffered_inputs)
    trainer.accelerator.wait_for_everyone()
    counts = session.metrics.counts()
    best = output_dir / f"checkpoint-{trl_state.best_global_step}"
    if trl_state.best_global_step and (best.is_dir() or best.name == staged.name):
        # transformers has looked for it beside the checkpoint that is being written.
        trl_state.best_model_checkpoint = str(best)
        if writes:
            trl_state.save_to_json(str(staged / transformers.trainer.TRAINER_STATE_NAME))
    if writes:
        state = TrainingState(
            fence=session.publisher.lease.fence,
            step=trl_state.global_step,
            micro_step=trainer._step,
            geometry=_geometry(trainer),
            **counts,
        )
        save_state(staged, state)
        commit(staged, output_dir / staged.name)
        transformers.trainer_utils.rotate_checkpoints(
            output_dir=str(output_dir),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trl_state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


def _restore(trainer: GRPOTrainer, session: Session, checkpoint: str, samplers: list[Iterable[int]]) -> None:
    folder = Path(checkpoint)
    state = load_state(folder)
    if state is None:
        logger.warning(
            f"{checkpoint} was not written by Lockstep: it does not say where in a generation batch it stands, nor "
            "in which order later epochs come, so the training continues from its weights but not exactly"
        )
        return
    now = _geometry(trainer)
    if changed := [f"{name}={now[name]} instead of {was}" for name, was in state.geometry.items() if now[name] != was]:
        raise InvalidRequest(
            f"{checkpoint} was written with batches arranged otherwise: {', '.join(changed)}; resume with the same "
            "options, or start a new run from its adapter with --init_adapter"
        )
    if trainer.is_fsdp_enabled:
        load_adapter(session.model, folder)
    trainer._step = state.micro_step
    batch_file = folder / _batch_file(trainer)
    trainer._buffered_inputs = None
    if batch_file.is_file():
        batches: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(batch_file).items():
            index, name = key.split(".", 1)
            batches.setdefault(int(index), {})[name] = tensor.to(trainer.accelerator.device)
        trainer._buffered_inputs = [batches[index] for index in sorted(batches)]
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


def _save_batches(path: Path, batches: list[dict[str, Any]]) -> None:
    """Write the micro-batches of a generation batch: one dict of tensors (or None) each."""
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
