"""Feeds everything that shows a training while it runs, on rank 0: files in output_dir, the run's page, metrics."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from learner.adapters.exporter import active_adapter
from learner.monitors.page_server import CHOSEN_PORT, serve_page
from learner.monitors.prometheus import LearnerMetrics
from learner.monitors.run_page import RunView, render
from learner.monitors.run_table import StepTable
from learner.monitors.samples import Samples
from learner.run_dir import files
from learner.run_dir.files import JsonLines, finite, read_lines
from learner.session import Session
from learner.step_metrics import StepReport
from learner.utils.atomic import write_atomically
from shared.errors import InvalidRequest
from shared.messages import one_line

logger = logging.getLogger("lockstep.monitors")

#: The page is rewritten at every log, unless writing would take more than this part of the training's time.
_PAGE_SHARE = 1 / 20
#: Settings to redact, and user information in URLs.
_SECRET = re.compile("token|secret|password|key", re.IGNORECASE)
_USER = re.compile(r"//[^/@\s]+@")


def attach_recorder(trainer: Trainer, session: Session) -> Recorder | None:
    """Record the training: history on disk, the run's page, Prometheus metrics. Collective.

    Returns the recorder on rank 0, None on other ranks. Sample completions go to its `samples`.

    Raises:
        LockstepError: `invalid_request` if `metrics_port` or `page_port` cannot be listened on.
    """
    recorder = Recorder(trainer, session) if trainer.accelerator.is_main_process else None
    session.publisher.on_main(lambda: recorder.serve() if recorder else None)
    if recorder:
        session.metrics.listeners.append(recorder.stepped)
        trainer.add_callback(recorder)
    return recorder


class Recorder(TrainerCallback):
    """Records one training; decides nothing about it."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._session, self._config = session, session.config
        output_dir, model = session.trainer.output_dir, str(session.model.config._name_or_path)
        self._history, self._logs = JsonLines(output_dir / files.HISTORY_FILE), JsonLines(output_dir / files.LOGS_FILE)
        self.samples, self._page = Samples(output_dir / files.SAMPLES_FILE), output_dir / files.PAGE_FILE
        self.metrics = LearnerMetrics(session.pool, run_id=session.run_id, model=model)
        lora = session.model.peft_config[active_adapter(session.model)].to_dict()
        settings = {
            "Lockstep": _changed(self._config, vars(self._config)),
            "TRL and transformers": _changed(trainer.args, trainer.args.to_dict()),  # without tokens
            "LoRA": {name: _plain(value) for name, value in lora.items() if value not in (None, False, {}, [], "")},
        }
        self._run = RunView(session.run_id, model, settings=settings)
        self._state = output_dir / files.STATE_FILE
        self._began = self._complained = False
        self._next_page = 0.0

    def serve(self) -> None:
        """Serve metrics and the run's page, where their ports were given.

        Raises:
            LockstepError: `invalid_request` if they cannot be listened on.
        """
        self.metrics.serve(self._config.metrics_host, self._config.metrics_port)
        if self._config.run_page:
            self._session.page = self._page.resolve().as_uri()
        if self._config.page_port:
            url = _serve_page(self._page.parent, self._config.page_host, self._config.page_port)
            logger.info("the run's page, live: %s", url)
            self._session.page = url

    def stepped(self, report: StepReport) -> None:
        """Record a completed optimizer step."""
        row = asdict(report)
        self._quietly(lambda: self._history.add(row))
        self._run.table.add_step(row)
        self.metrics.stepped(report, self._session.rollouts.stats)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._run.error = True, None
        for lines in (self._history, self._logs):
            lines.begin(state.global_step)
        self.metrics.begin(state.global_step, state.max_steps, self._session.rollouts.stats)
        if self._config.run_page:
            self._run.table = StepTable()
            for row in read_lines(self._history.path):
                self._run.table.add_step(row)
            for row in read_lines(self._logs.path):
                self._run.table.add_log(row)
            self.samples.begin(state.global_step)
        self._write("training")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logged = {name: finite(value) for name, value in (logs or {}).items()}
        row = {"step": state.global_step, "time": round(time.time(), 3), **logged}
        self._quietly(lambda: self._logs.add(row))
        self._run.table.add_log(row)
        self.metrics.logged(row)
        if time.monotonic() >= self._next_page:
            self._write(self._run.state)  # an evaluation may come after the end

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write("finished" if state.global_step >= state.max_steps else "stopped")

    def failed(self, error: BaseException) -> None:
        """Record that the training has ended with an error, or an interruption: of the user, which is not an error."""
        if not self._began and self._state.is_file():
            return  # the files are those of a training that has begun
        failed = isinstance(error, Exception)
        self._run.error = one_line(error) if failed else None
        self._write("failed" if failed else "stopped")

    def _write(self, state: str) -> None:
        if not self._config.run_page:
            return
        began, run = time.monotonic(), self._run
        run.state, run.batches, run.updated = state, self.samples.batches, time.time()
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
        self._quietly(self.samples.write)
        shown = {name: getattr(run, name) for name in ("run_id", "model", "state", "error", "servers", "settings")}
        self._quietly(lambda: write_atomically(self._state, json.dumps(shown) + "\n"))
        self._quietly(lambda: write_atomically(self._page, render({self._page.parent.name: run})))
        ended = time.monotonic()
        self._next_page = ended + (ended - began) / _PAGE_SHARE

    def _quietly(self, write: Callable[[], None]) -> None:
        """Log a failed write, once: a full disk must not end a training that needs no checkpoint now."""
        try:
            write()
        except OSError as error:
            if not self._complained:
                logger.warning("run.html or its data is not up to date: %s (reported once)", error)
            self._complained = True


def _changed(config: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Format the settings that differ from their defaults."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    return {name: _plain(value) for name, value in values.items() if value != defaults.get(name) and value is not None}


def _plain(value: Any) -> str:
    """Format a setting without passwords and tokens, since the page may be shared."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {'…' if _SECRET.search(str(k)) else _plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple | set):
        texts = map(_plain, value)
        return ", ".join(sorted(texts) if isinstance(value, set) else texts)
    return _USER.sub("//…@", str(value))


def _serve_page(folder: Path, host: str, port: int) -> str:
    """Serve the run's page; at a free port where `port` is taken and nobody has asked for it."""
    try:
        return serve_page(folder, host, port)
    except InvalidRequest:
        if os.environ.get(CHOSEN_PORT) != str(port):
            raise
        return serve_page(folder, host, 0)
