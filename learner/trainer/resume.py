"""Exact resume under a `trl.GRPOTrainer`: save and restore the state that its own checkpoints leave out.

This is the position in a generation batch, the batch itself, the order of later epochs (TRL's sampler draws it from a
new generator), and under FSDP2 the adapter, whose names change once activation checkpointing has wrapped the layers.
Before anything is loaded, all ranks compare where they resume from, and what that was trained with.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.trainer_utils
from accelerate.state import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trl import GRPOConfig, GRPOTrainer

from learner.adapters.exporter import active_adapter
from learner.adapters.peft_dir import load_adapter, save_adapter
from learner.config import LearnerConfig
from learner.run_dir.checkpoint import (
    STAGING,
    TrainingState,
    check_settings,
    commit,
    file_sizes,
    last_checkpoint,
    load_state,
    require_undamaged,
    rotate,
    save_state,
)
from learner.run_dir.files import FINAL_ADAPTER
from learner.session import Session
from learner.trainer.prompt_order import indexable, schedule_of, skip_epochs
from learner.utils.distributed import on_every_rank
from shared.errors import InvalidRequest

logger = logging.getLogger("lockstep.trainer")

#: Before the names of what is a list of integers in a generation batch.
_LIST = "list."


def resume_exactly(trainer: GRPOTrainer, session: Session) -> None:
    """Wrap the trainer's methods that write and read checkpoints."""
    samplers: list[Iterable[int]] = []
    make_sampler, save = trainer._get_train_sampler, trainer._save_checkpoint
    load, train = trainer._load_optimizer_and_scheduler, trainer.train

    def remembered_sampler(*args: Any) -> Iterable[int]:
        samplers.append(make_sampler(*args))
        return samplers[-1]

    def load_with_state(checkpoint: str | None) -> None:
        # Called by transformers after the model, and before the first step.
        load(checkpoint)
        if checkpoint is not None:
            _restore(trainer, session, checkpoint, samplers)

    def train_from(resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        output_dir, asked = trainer.args.output_dir, resume_from_checkpoint or False

        def check(checkpoint: Path) -> None:
            _check_batch(trainer, checkpoint)
            _check_exact(checkpoint, trainer.args, session.config)

        checkpoint = resume_point(output_dir, asked, session.settings, check)
        return train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    trainer._get_train_sampler = remembered_sampler
    trainer._save_checkpoint = lambda model, trial: _save(trainer, session, partial(save, model, trial))
    trainer._load_optimizer_and_scheduler = load_with_state
    trainer._determine_best_metric = partial(_is_best, trainer._determine_best_metric)
    trainer._load_best_model = partial(_load_best, trainer, session, trainer._load_best_model)
    trainer.train = train_from


def resume_point(
    output_dir: str | Path,
    asked: str | Path | bool | None,
    settings: Mapping[str, Any],
    check: Callable[[Path], object] = lambda checkpoint: None,
) -> Path | None:
    """Return the checkpoint to resume from; None: start over. Collective.

    Args:
        asked: a path; true: the last one in `output_dir`; false: none; None: the last one of ours, if any.
        settings: what it, and a finished adapter in `output_dir`, must have been trained with.
        check: raises if this rank cannot go on from it.

    Raises:
        LockstepError: `invalid_request` on every rank, if it was trained with other settings, is damaged or missing, or
            if the ranks, without a shared `output_dir`, would resume from different places.
    """

    def place() -> tuple[Path | None, str]:
        try:
            return found()
        except OSError as error:  # ranks share only errors of ours
            raise InvalidRequest(f"output_dir {output_dir}, resume_from_checkpoint {asked}: {error}") from error

    def found() -> tuple[Path | None, str]:
        checkpoint, state = _choose(Path(output_dir), asked), None
        if checkpoint is not None:
            check_settings(checkpoint, settings)
            check(checkpoint)
            state = load_state(checkpoint)
        if asked is not False and (checkpoint is None or checkpoint.parent.resolve() != Path(output_dir).resolve()):
            check_settings(Path(output_dir) / FINAL_ADAPTER, settings)  # which this training would write over
        # Copies on several nodes are one place, though every node has only its own ranks' files.
        identity = json.dumps(asdict(replace(state, files={}))) if state else checkpoint.name if checkpoint else ""
        return checkpoint, identity

    places = on_every_rank(place)
    if len({identity for _, identity in places}) > 1:
        listed = ", ".join(f"rank {rank} {path or 'starts over'}" for rank, (path, _) in enumerate(places))
        raise InvalidRequest(
            f"the ranks would resume from different places: {listed}; give all nodes one shared output_dir, or copy "
            "the checkpoint to every node and name it with resume_from_checkpoint"
        )
    return places[PartialState().process_index][0]


def _choose(output_dir: Path, asked: str | Path | bool | None) -> Path | None:
    if asked is False:
        return None
    if asked is not None and asked is not True:
        if not Path(asked).is_dir():
            raise InvalidRequest(f"resume_from_checkpoint {asked}: no such directory; give one, or true or false")
        return _with_state(Path(asked))
    if (last := last_checkpoint(output_dir)) is not None:
        return last
    require_undamaged(output_dir)
    if not asked:
        return None
    others = transformers.trainer_utils.get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if others is None:
        raise InvalidRequest(f"resume_from_checkpoint: {output_dir} holds no checkpoint; leave it out to start")
    return _with_state(Path(others))


def _with_state(checkpoint: Path) -> Path:
    """Return a checkpoint; refuse a directory that is none, such as the output_dir that holds some."""
    if not (checkpoint / transformers.trainer.TRAINER_STATE_NAME).is_file():
        last = last_checkpoint(checkpoint) or transformers.trainer_utils.get_last_checkpoint(str(checkpoint))
        raise InvalidRequest(
            f"resume_from_checkpoint: {checkpoint} has no {transformers.trainer.TRAINER_STATE_NAME}, so it is no "
            f"checkpoint; {f'the last one in it is {last}' if last else 'give one'}"
        )
    return checkpoint


def _check_exact(checkpoint: Path, args: GRPOConfig, config: LearnerConfig) -> None:
    """Say what does not go on where the checkpoint was made; refuse it where the same bytes are asked for."""
    held = [path.name for path in checkpoint.iterdir()]
    anew = []
    # transformers loads both or neither; DeepSpeed has them in a directory of its own.
    both = any(name.startswith("optimizer") for name in held) and transformers.trainer.SCHEDULER_NAME in held
    if not (both or any(name.startswith("global_step") for name in held)):
        anew.append(
            "the optimizer and the learning rate's schedule (the checkpoint lacks them, as with save_only_model)"
        )
    if not any(name.startswith("rng_state") for name in held):
        anew.append("random numbers (it lacks their state)")
    if args.ignore_data_skip:
        anew.append("the rows of the epoch (ignore_data_skip)")
    if anew and config.deterministic:
        raise InvalidRequest(
            f"deterministic: the training cannot go on from {checkpoint} to the same bytes, since it would start anew "
            f"with {'; '.join(anew)}; resume from another checkpoint, or leave deterministic out"
        )
    if anew:
        logger.warning(f"resuming from {checkpoint} starts anew with {'; '.join(anew)}")


def _check_batch(trainer: GRPOTrainer, checkpoint: Path) -> None:
    """Refuse a checkpoint within a generation batch that lacks this rank's part of it."""
    state, batch_file = load_state(checkpoint), checkpoint / _batch_file(trainer)
    if state and _within_batch(trainer, state.micro_step) and not batch_file.is_file():
        raise InvalidRequest(
            f"{batch_file} is missing, and the checkpoint lies within a generation batch: copy the checkpoint whole, "
            "with the files of all ranks"
        )
    if not batch_file.is_file():
        return
    with safe_open(batch_file, "pt") as batch:
        held = {name.partition(".")[2] for name in batch.keys()}  # noqa: SIM118 - it is no dict
    for option, value, needed in (
        ("beta", trainer.args.beta, "ref_per_token_logps"),
        (
            "vllm_importance_sampling_correction",
            trainer.args.vllm_importance_sampling_correction,
            "importance_sampling_ratio",
        ),
    ):
        if value and needed not in held:
            raise InvalidRequest(
                f"{option}={value}: {checkpoint} lies within a generation batch that was scored without; go on with "
                f"{option}={type(value)(0)}, or from a checkpoint between two batches"
            )


def can_save(trainer: GRPOTrainer) -> bool:
    """Return whether the training can be saved now: not if a generation batch is under way that cannot be written."""
    batches = (trainer._buffered_inputs or []) if _within_batch(trainer, trainer._step) else []
    return all(value is None or _writable(value) for batch in batches for value in batch.values())


def _within_batch(trainer: GRPOTrainer, micro_step: int) -> bool:
    schedule = schedule_of(trainer)
    return schedule.next_batch(micro_step) != schedule.batch_at(micro_step)


def training_state(trainer: GRPOTrainer, session: Session) -> TrainingState:
    """Return the state of the training now, without files. Collective."""
    counts: dict[str, Any] = session.metrics.counts()
    return TrainingState(
        fence=session.publisher.lease.fence,
        step=trainer.state.global_step,
        micro_step=trainer._step,
        settings=session.settings,
        **counts,
    )


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
    if _within_batch(trainer, trainer._step):
        _save_batches(staged / _batch_file(trainer), trainer._buffered_inputs)
    trainer.accelerator.wait_for_everyone()
    state = training_state(trainer, session)
    best = output_dir / f"checkpoint-{trl_state.best_global_step}"
    if trl_state.best_global_step and (best.is_dir() or best.name == staged.name):
        # transformers has looked for it beside the checkpoint that is being written.
        trl_state.best_model_checkpoint = str(best)
        if writes:
            trl_state.save_to_json(str(staged / transformers.trainer.TRAINER_STATE_NAME))
    if writes:
        save_state(staged, replace(state, files=file_sizes(staged)))
        final = output_dir / staged.name
        commit(staged, final)
        rotate(output_dir, trainer.args.save_total_limit, keep={final, Path(trl_state.best_model_checkpoint or final)})
    trainer.accelerator.wait_for_everyone()


def _restore(trainer: GRPOTrainer, session: Session, checkpoint: str, samplers: list[Iterable[int]]) -> None:
    folder, model = Path(checkpoint), session.model
    if not trainer.is_deepspeed_enabled and active_adapter(model) == "default" and len(model.peft_config) > 1:
        # Of a checkpoint with others beside it (TRL's reference of a pretrained one), transformers loads the others.
        load_adapter(model, folder)
    state = load_state(folder)
    if state is None:
        logger.warning(
            f"{checkpoint} was not written by Lockstep: it does not say where in a generation batch it stands, nor "
            "in which order later epochs come, so the training continues from its weights but not exactly"
        )
        return
    if trainer.is_fsdp_enabled:
        load_adapter(model, folder)
    trainer._step = state.micro_step
    batch_file = folder / _batch_file(trainer)
    trainer._buffered_inputs = None
    if batch_file.is_file():
        batches: dict[int, dict[str, torch.Tensor | list[int]]] = {}
        for key, tensor in load_file(batch_file).items():
            index, name = key.split(".", 1)
            listed = name.startswith(_LIST)
            value = tensor.tolist() if listed else tensor.to(trainer.accelerator.device)
            batches.setdefault(int(index), {})[name.removeprefix(_LIST)] = value
        trainer._buffered_inputs = [batches[index] for index in sorted(batches)]
    if indexable(trainer):  # transformers itself reads a stream up to its place
        skip_epochs(samplers[-1], schedule_of(trainer).epoch_at(state.step))
    before, now = state.settings.get("learning_rate"), trainer.args.learning_rate
    # A checkpoint without them leaves the new optimizer and scheduler as they are.
    if before and before != now and (trainer.is_deepspeed_enabled or (folder / "scheduler.pt").is_file()):
        _scale_learning_rate(trainer.optimizer, trainer.lr_scheduler, now / before)
    session.metrics.restore(state.pushes, state.completions, state.completion_tokens)


def _is_best(compare: Callable[..., bool], metrics: Mapping[str, float], trial: Any) -> bool:
    """Compare an evaluation with the best so far, by a metric that only evaluations themselves know."""
    try:
        return compare(metrics=metrics, trial=trial)
    except KeyError as error:
        raise InvalidRequest(
            f"metric_for_best_model: the evaluation has no such metric, but {', '.join(metrics)}"
        ) from error


def _load_best(trainer: GRPOTrainer, session: Session, load: Callable[[], None]) -> None:
    """Load the best checkpoint at the end of a training, and let the servers have it, too. Collective."""
    state = trainer.state
    if session.interrupted and state.global_step < state.max_steps:
        return  # it goes on from its last step, which may be saved after this
    load()
    if state.best_global_step != state.global_step:
        session.push_loaded()


def _scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Let a changed learning rate count: optimizer and scheduler have just been given those of the checkpoint."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # within accelerate's wrapper
    scheduler.base_lrs = [rate * factor for rate in getattr(scheduler, "base_lrs", ())]
    for group in optimizer.param_groups:
        group |= {name: group[name] * factor for name in ("lr", "initial_lr") if name in group}
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _batch_file(trainer: GRPOTrainer) -> str:
    return f"generation_batch_{trainer.accelerator.process_index}.safetensors"


def _save_batches(path: Path, batches: list[dict[str, Any]]) -> None:
    """Write the micro-batches of a generation batch: one dict of tensors, lists of integers, or None each."""
    tensors = {}
    for index, batch in enumerate(batches):
        for name, value in batch.items():
            if value is None:
                continue
            if not _writable(value):
                raise InvalidRequest(
                    f"{name} of a generation batch is no tensor and cannot be checkpointed: set save_steps to a "
                    "multiple of the optimizer steps per generation batch"
                )
            if isinstance(value, list):
                tensors[f"{index}.{_LIST}{name}"] = torch.tensor(value, dtype=torch.int64)
            else:
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, path)


def _writable(value: Any) -> bool:
    """Return whether a value is a tensor, or a list of integers (such as how many images each row has)."""
    is_list = isinstance(value, list) and all(type(item) is int for item in value)
    return is_list or isinstance(value, torch.Tensor)
