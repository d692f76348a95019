"""Progress of a training on the terminal."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from functools import partial
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from learner.session import Session
from learner.step_metrics import StepReport


class Progress(TrainerCallback):
    """A progress bar on a terminal, one line per step elsewhere. Leaves TRL's `report_to` alone."""

    def __init__(self, *, bar: bool, page: str | None = None) -> None:
        self._wants_bar, self._page = bar, page
        self._bar: tqdm | None = None
        self._started, self._first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self._wants_bar:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "eval_reward" in logs:
            self._show_page()
            write = tqdm.write if self._bar is not None else partial(print, flush=True)
            write(f"step {state.global_step}: eval reward {logs['eval_reward']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, report: StepReport) -> None:
        """Show a completed optimizer step."""
        self._show_page()
        reward = "-" if report.reward is None else f"{report.reward:.3f}"
        servers = f"  {report.servers_up} of {report.servers} servers" if report.servers > 1 else ""
        gap = "" if report.logprob_gap is None else f"  gap {report.logprob_gap:.1e}"
        used = "" if report.flops_utilisation is None else f" ({report.flops_utilisation:.0%} of peak)"
        summary = (
            f"reward {reward}  lag {report.lag:g}  {report.seconds:.1f} s, {report.wait_seconds:.1f} waiting  "
            f"rollouts {report.rollout_tokens_per_second:.0f} tok/s  "
            f"training {report.train_tokens_per_second:.0f} tok/s{used}  push {report.push_seconds:.2f} s{servers}{gap}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(summary)
            self._bar.update(report.step - self._bar.n)
        else:
            done = report.step - self._first_step
            seconds = (time.perf_counter() - self._started) / max(done, 1) * (report.max_steps - report.step)
            left = timedelta(seconds=int(seconds))
            print(f"step {report.step}/{report.max_steps}  {summary}  left {left}", flush=True)

    def _show_page(self) -> None:
        """Say where the page is, before the first reward of this process: of a step, or of an evaluation."""
        if self._page is not None:
            write = tqdm.write if self._bar is not None else partial(print, flush=True)
            write(f"open the page: {self._page}")
            self._page = None


def show_progress(trainer: Trainer, session: Session) -> None:
    """Replace transformers' progress callbacks by ours."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = Progress(bar=sys.stderr.isatty() and not trainer.args.disable_tqdm, page=session.page)
    trainer.add_callback(progress)
    if trainer.accelerator.is_main_process:
        session.metrics.listeners.append(progress.show)
