"""What the user sees on the terminal while training: a line of progress."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from learner.session import Session
from learner.step_metrics import StepReport


class Progress(TrainerCallback):
    """One line that moves on a terminal, one line per step elsewhere. TRL's `report_to` is not touched."""

    def __init__(self, *, bar: bool | None = None) -> None:
        self._wants_bar = sys.stderr.isatty() if bar is None else bar
        self._bar: tqdm | None = None
        self._started, self._first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self._wants_bar:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "eval_reward" in logs:
            self._write(f"step {state.global_step}: eval reward {logs['eval_reward']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, report: StepReport) -> None:
        """A step has ended."""
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(report))
            self._bar.update(report.step - self._bar.n)
        else:
            done = report.step - self._first_step
            left = (time.perf_counter() - self._started) / max(done, 1) * (report.max_steps - report.step)
            self._write(f"step {report.step}/{report.max_steps}  {_figures(report)}  left {_clock(left)}")

    def _write(self, text: str) -> None:
        if self._bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)


def show_progress(trainer: Trainer, session: Session) -> None:
    """Put our progress line in the place of transformers' own."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = Progress(bar=False if trainer.args.disable_tqdm else None)
    trainer.add_callback(progress)
    if trainer.accelerator.is_main_process:
        session.metrics.listeners.append(progress.show)


def _figures(report: StepReport) -> str:
    reward = "-" if report.reward is None else f"{report.reward:.3f}"
    servers = f"  {report.servers_up} of {report.servers} servers" if report.servers > 1 else ""
    gap = "" if report.logprob_gap is None else f"  gap {report.logprob_gap:.1e}"
    return (
        f"reward {reward}  lag {report.lag:g}  {report.rollout_tokens_per_second:.0f} tok/s  "
        f"push {report.push_seconds:.2f} s{servers}{gap}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
