"""Where TRL's logs and our figures meet: whatever shows a training while it runs is fed from here, on rank 0."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from learner.adapters.exporter import active_adapter
from learner.monitors.prometheus import LearnerMetrics
from learner.monitors.run_page import RunData, render
from learner.monitors.samples import Sample, Samples
from learner.run_dir.files import (
    HISTORY_FILE,
    LOGS_FILE,
    PAGE_FILE,
    SAMPLES_FILE,
    JsonLines,
    finite,
    read_lines,
    write_whole,
)
from learner.session import Session
from learner.step_metrics import StepReport

logger = logging.getLogger("lockstep.monitors")
#: The page is written at every log, unless that would take more than one part in so many of the training's time.
_PAGE_EVERY = 20
#: Names of settings whose values are nobody's business, and what stands before the host in a URL.
_SECRET = re.compile("token|secret|password|key", re.IGNORECASE)
_USER = re.compile(r"//[^/@\s]+@")


def watch(trainer: GRPOTrainer, session: Session) -> Recorder | None:
    """Keep the history on disk, write the run's page, and serve metrics. Collective.

    Raises:
        LockstepError: `invalid_request` if nothing can listen on `metrics_port`.
    """
    watching = Recorder(trainer, session) if trainer.accelerator.is_main_process else None
    session.publisher.on_main(watching.serve_metrics if watching else lambda: None)
    if watching:
        session.metrics.listeners.append(watching.stepped)
        trainer.add_callback(watching)
    return watching


class Recorder(TrainerCallback):
    """Everything that shows the training, under one trainer."""

    def __init__(self, trainer: GRPOTrainer, session: Session) -> None:
        self._trainer, self._session, self._config = trainer, session, session.config
        output_dir, model = session.trainer.output_dir, str(session.model.config._name_or_path)
        self._history, self._logs = JsonLines(output_dir / HISTORY_FILE), JsonLines(output_dir / LOGS_FILE)
        self._samples, self._page = Samples(output_dir / SAMPLES_FILE), output_dir / PAGE_FILE
        self._metrics = LearnerMetrics(session.pool, run_id=session.run_id, model=model)
        self._run = RunData(session.run_id, model, settings=_settings(trainer, session))
        self._complained, self._next_page = False, 0.0
        self._steps: list[dict[str, Any]] = []
        self._logged: list[dict[str, Any]] = []

    def serve_metrics(self) -> None:
        """On the port that was asked for."""
        if self._config.metrics_port:
            self._metrics.serve(self._config.metrics_host, self._config.metrics_port)
            logger.info(f"metrics on http://{self._config.metrics_host}:{self._config.metrics_port}/metrics")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for lines in (self._history, self._logs):
            lines.begin(state.global_step)
        self._metrics.begin(state.global_step, state.max_steps, self._session.rollouts.stats)
        if self._config.run_page:
            self._steps, self._logged = read_lines(self._history.path), read_lines(self._logs.path)
            self._samples.begin(state.global_step)
            self._write("training")

    def stepped(self, report: StepReport) -> None:
        """A step has ended."""
        row = asdict(report)
        self._history.add(row)
        self._steps.append(row)
        self._metrics.stepped(report, self._session.rollouts.stats)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = {"step": state.global_step, **{name: finite(value) for name, value in (logs or {}).items()}}
        self._quietly(lambda: self._logs.add(row))
        self._logged.append(row)
        self._metrics.logged(row)
        if time.monotonic() >= self._next_page:
            self._write("training")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write("finished" if state.global_step >= state.max_steps else "stopped")

    def add_samples(self, step: int, samples: list[Sample]) -> None:
        """Keep samples of the generation batch that `step` trains on."""
        self._samples.add(step, samples)

    def _write(self, state: str) -> None:
        if not self._config.run_page:
            return
        began, run = time.monotonic(), self._run
        run.state, run.steps, run.logs, run.batches = state, self._steps, self._logged, self._samples.batches
        run.servers = [
            {
                "url": _plain(replica.url),
                "up": replica.up,
                "tokens": replica.load.tokens,
                "step": replica.receipt.version.step if replica.receipt else None,
                "error": str(replica.error) if replica.error else None,
            }
            for replica in list(self._session.pool.replicas.values())
        ]
        self._quietly(self._samples.write)
        self._quietly(lambda: write_whole(self._page, render(run)))
        ended = time.monotonic()
        self._next_page = ended + _PAGE_EVERY * (ended - began)

    def _quietly(self, write: Callable[[], None]) -> None:
        """A full disk must not end a training that writes no checkpoint just now."""
        try:
            write()
        except OSError as error:
            if not self._complained:
                logger.warning(f"what shows the run is not up to date: {error} (said once)")
            self._complained = True


def _settings(trainer: GRPOTrainer, session: Session) -> dict[str, dict[str, Any]]:
    """What was set otherwise than by default."""
    ours = {f.name: getattr(session.config, f.name) for f in fields(session.config)}
    lora = session.model.peft_config[active_adapter(session.model)].to_dict()
    return {
        "Lockstep": _changed(session.config, ours),
        "TRL and transformers": _changed(trainer.args, trainer.args.to_dict()),  # which leaves tokens out
        "LoRA": {name: _plain(value) for name, value in lora.items() if value not in (None, False, {}, [], "")},
    }


def _changed(config: Any, values: Mapping[str, Any]) -> dict[str, str]:
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    return {name: _plain(value) for name, value in values.items() if value != defaults.get(name) and value is not None}


def _plain(value: Any) -> str:
    """As text, with what may be a password or a token left out: the page may be passed on."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {'…' if _SECRET.search(str(k)) else _plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple | set):
        texts = map(_plain, value)
        return ", ".join(sorted(texts) if isinstance(value, set) else texts)
    return _USER.sub("//…@", str(value))
