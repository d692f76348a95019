"""Leave a training so that it can go on: at SIGTERM (Slurm, Kubernetes, spot machines) and Ctrl-C, when servers stay
away, and when a reward function or an agent fails.

The first SIGTERM, SIGUSR1 or SIGINT lets the step under way end, and a checkpoint be saved; the second one ends the
process as if nobody had listened. A program with a handler of its own keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState
from trl import GRPOTrainer

from learner.agents.episodes import AgentError
from learner.rewards.calls import RewardError
from learner.run_dir.checkpoint import last_checkpoint, load_state
from learner.servers.pool import RECOVERABLE
from learner.session import Session
from learner.trainer.resume import can_save
from learner.utils.processes import each_signal, raise_stopped
from shared.errors import LockstepError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: What they do where a program has no handler of its own.
_USUAL = (signal.SIG_DFL, signal.default_int_handler, raise_stopped)

#: Launchers signal a process and its group, or every rank: signals so close to each other are one request.
_ONE_REQUEST_S = 1.0

logger = logging.getLogger("lockstep.trainer")


class _Leave(TrainerCallback):
    """Ends the training with a checkpoint once a signal has come."""

    def __init__(self, trainer: GRPOTrainer, session: Session) -> None:
        self.trainer, self.session = trainer, session
        self._in_steps, self._heard = False, 0.0
        self._before: dict[signal.Signals, Any] = {}
        #: TRL's micro-steps at the end of the last optimizer step: what has been done since is not in a checkpoint.
        self._micro_step = -1
        self._end: _StepEnd | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals during the block, except those that the program handles itself."""
        self.session.interrupted = self.session.pool.leaving = None  # of an earlier training
        handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
        self._before = {number: handler for number, handler in handlers.items() if handler in _USUAL}
        with each_signal(self._handle, *self._before):
            try:
                yield
            finally:
                self._in_steps = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.session.interrupted and time.monotonic() < self._heard + _ONE_REQUEST_S:
            return
        if self.session.interrupted or not self._in_steps:  # there is nothing to finish, or no time
            before = self._before[signal.Signals(number)]
            at_once = signal.SIG_DFL if self.session.interrupted and number in SIGNALS else before
            signal.signal(number, at_once)
            signal.raise_signal(number)
            return
        self.session.interrupted, self._heard = name, time.monotonic()
        self.session.pool.leaving = f"{name} has come"
        if self.trainer.accelerator.is_main_process:
            step = self.trainer.state.global_step + 1
            text = (
                f"\n{name}: the training ends after step {step}, with a checkpoint; a second signal ends it at once\n"
            )
            os.write(2, text.encode())  # a logger may be in the middle of a line

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._in_steps:
            self._in_steps, self._micro_step = True, self.trainer._step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._micro_step = self.trainer._step  # before the push, which may fail

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end = _StepEnd(state)
        if state.global_step < state.max_steps and self._all_leave() and can_save(self.trainer):
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end = _StepEnd(state)  # its loader has drawn a random number
        if self._in_steps and state.global_step < state.max_steps and self._all_leave() and can_save(self.trainer):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._in_steps = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.session.interrupted:
            logger.info("%s: step %d of %d is saved", self.session.interrupted, state.global_step, state.max_steps)

    def _all_leave(self) -> bool:
        """Return whether a signal has come to any rank, and let all know; Ctrl-C to one is to all. Collective."""
        accelerator, session = self.trainer.accelerator, self.session
        if accelerator.num_processes > 1:
            own = [bool(session.interrupted), session.interrupted == signal.SIGINT.name]
            came = torch.tensor(own, dtype=torch.float32, device=accelerator.device)
            signals, interrupts = accelerator.reduce(came, reduction="sum").tolist()
            if signals and not session.interrupted:
                session.interrupted, self._heard = "a signal to another rank", time.monotonic()
            if interrupts:
                session.interrupted = signal.SIGINT.name
        return bool(session.interrupted)

    def save_stopped(self) -> None:
        """Save the last step if a signal has come and nothing has saved it: `save_strategy` best, say. Collective."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if not 0 < step < trainer.state.max_steps or not self._all_leave() or not can_save(trainer):
            return
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        if not self.session.publisher.on_main(checkpoint.is_dir):
            trainer._save_checkpoint(trainer.model, None)

    def interrupt(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C has ended the training early: no script must go on as if it had not."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if self.session.interrupted == signal.SIGINT.name and step < trainer.state.max_steps:
            checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
            raise KeyboardInterrupt(
                f"step {step} of {trainer.state.max_steps} is saved in {checkpoint}: resume from it"
            )

    def save_after(self, error: LockstepError) -> None:
        """Save the steps that were done before `error`, if they are not its cause, and add to it where they are."""
        trainer, output_dir = self.trainer, Path(self.trainer.args.output_dir)
        step = trainer.state.global_step
        between_steps = trainer._step == self._micro_step and can_save(trainer)
        is_elsewhere = error.code in RECOVERABLE or isinstance(error, RewardError | AgentError)
        if is_elsewhere and step and between_steps and trainer.accelerator.num_processes == 1:
            last = last_checkpoint(output_dir)
            state = load_state(last) if last else None
            if state is None or state.step < step:
                try:
                    # Passes may have scored the next batch. An evaluation is not made again.
                    if self._end and self._end.step == step and trainer.model.training:
                        self._end.restore(trainer.state)
                    trainer._save_checkpoint(trainer.model, None)
                except Exception as problem:  # of the disk, of any kind: the first error says more
                    logger.warning("step %d could not be saved: %s", step, problem)
        if last := last_checkpoint(output_dir):
            error.message += f"; the last checkpoint is {last}: resume from it"


class _StepEnd:
    """What a batch that fails changes of a checkpoint, as it is at the end of a step: random numbers, tokens seen."""

    def __init__(self, state: TrainerState) -> None:
        self.step, self._tokens = state.global_step, state.num_input_tokens_seen
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self, state: TrainerState) -> None:
        """Go back to them."""
        state.num_input_tokens_seen = self._tokens
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def leave_in_order(trainer: GRPOTrainer, session: Session) -> None:
    """Let `trainer.train` end in order on signals and errors that are not its own; call it after `resume_exactly`."""
    leave, train = _Leave(trainer, session), trainer.train
    trainer.add_callback(leave)

    def train_or_leave(*args: Any, **kwargs: Any) -> Any:
        with leave.listening():
            try:
                output = train(*args, **kwargs)
                leave.save_stopped()
                leave.interrupt()
                return output
            except LockstepError as error:
                leave.save_after(error)
                raise

    trainer.train = train_or_leave
