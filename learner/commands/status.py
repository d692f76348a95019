"""`learner status`: which rollout servers serve what, and how far a run has come, while it trains and afterwards."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from learner.monitors.charts import sparkline
from learner.run_dir.files import HISTORY_FILE, LOGS_FILE, SUMMARY_FILE, finite, read_lines
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.servers.discovery import ServerDiscovery
from learner.utils.threads import all_of
from shared.errors import InvalidRequest, LockstepError
from shared.weights import RunState

_ASK_TIMEOUT_S = 5.0
_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class RunRow:
    """One run on one server. `lag`: optimizer steps behind the newest that is known of the run."""

    run_id: str
    step: int | None
    fence: int | None
    lag: int | None
    running_requests: int


@dataclass(frozen=True)
class ServerRow:
    """One server; `error` says why nothing is known of it."""

    url: str
    state: str
    model: str | None = None
    epoch: str | None = None
    runs: tuple[RunRow, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come, by its directory.

    Attributes:
        run_id: None where the directory does not say.
        seconds_ago: since the last step.
        finished: the training has ended.
        rewards: of all steps.
        last: the last step, see `learner.step_metrics.StepReport`.
    """

    run_id: str | None
    step: int
    max_steps: int
    seconds_ago: float
    finished: bool
    rewards: list[float]
    eval_reward: float | None
    eval_step: int | None
    last: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """The command. Answers the exit code: 1 if nothing is known of what was asked for."""
    options = make_parser().parse_args(argv)
    if not options.rollout_url and not options.run_dir:
        raise InvalidRequest("give --rollout-url, --run-dir, or both")
    clients = _Clients(options)
    while True:
        progress = read_progress(Path(options.run_dir)) if options.run_dir else None
        servers = clients.ask(progress)
        if options.json:
            shown = json.dumps({"servers": [asdict(s) for s in servers], "run": progress and asdict(progress)})
        else:
            shown = "\n".join([*_progress_lines(progress, options.run_dir), *_server_lines(servers)])
        print((_CLEAR if options.watch and sys.stdout.isatty() and not options.json else "") + shown, flush=True)
        if not options.watch:
            known = (progress is not None or not options.run_dir) and (not servers or any(not s.error for s in servers))
            return 0 if known else 1
        time.sleep(options.watch)


def read_progress(run_dir: Path) -> RunProgress | None:
    """What a run's directory says; None before its first step.

    Raises:
        LockstepError: `invalid_request` if there is no such directory.
    """
    if not run_dir.is_dir():
        raise InvalidRequest(f"run_dir {run_dir} is no directory; give a run's output_dir")
    history, summary = run_dir / HISTORY_FILE, run_dir / SUMMARY_FILE
    rows = read_lines(history)
    if not rows:
        return None
    evals = [row for row in read_lines(run_dir / LOGS_FILE) if finite(row.get("eval_reward")) is not None]
    ended = summary.is_file() and summary.stat().st_mtime >= history.stat().st_mtime
    rewards = [value for row in rows if (value := finite(row.get("reward"))) is not None]
    return RunProgress(
        run_id=_run_id(run_dir),
        step=rows[-1]["step"],
        max_steps=rows[-1]["max_steps"],
        seconds_ago=max(time.time() - history.stat().st_mtime, 0.0),
        finished=ended,
        rewards=rewards,
        eval_reward=evals[-1]["eval_reward"] if evals else None,
        eval_step=evals[-1]["step"] if evals else None,
        last={name: None if isinstance(v, float) and finite(v) is None else v for name, v in rows[-1].items()},
    )


class _Clients:
    """Asks all servers at once; those of a name or a file may be others each time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._places = ServerDiscovery(options.rollout_url) if options.rollout_url else None
        token = read_token(options.token_file)
        self._connect: Callable[[str], RolloutClient] = partial(RolloutClient, token=token, ca_file=options.ca_file)
        self._clients: dict[str, RolloutClient] = {}

    def ask(self, progress: RunProgress | None) -> list[ServerRow]:
        urls = self._places.urls() if self._places else []
        for url in urls:
            if url not in self._clients:
                self._clients[url] = self._connect(url)
        answers = all_of([partial(self._one, url) for url in urls], "status")
        newest: dict[str, int] = {}
        known = [(run.run_id, run.version.step) for _, runs in answers for run in runs if run.version]
        if progress and progress.run_id:
            known.append((progress.run_id, progress.step))
        for run_id, step in known:
            newest[run_id] = max(newest.get(run_id, 0), step)
        return [_with_runs(row, runs, newest) for row, runs in answers]

    def _one(self, url: str) -> tuple[ServerRow, list[RunState]]:
        try:
            state = self._clients[url].state(timeout_s=_ASK_TIMEOUT_S)
        except LockstepError as error:
            return ServerRow(url, "away", error=str(error)), []
        said = "draining" if state.draining else "ready" if state.ready else "not ready"
        return ServerRow(url, said, state.model, state.epoch), state.runs


def _with_runs(row: ServerRow, runs: Sequence[RunState], newest: dict[str, int]) -> ServerRow:
    rows = []
    for run in runs:
        version = run.version
        lag = newest[run.run_id] - version.step if version else None
        step, fence = (version.step, version.fence) if version else (None, None)
        rows.append(RunRow(run.run_id, step, fence, lag, run.running_requests))
    return ServerRow(row.url, row.state, row.model, row.epoch, tuple(rows), row.error)


def _run_id(run_dir: Path) -> str | None:
    """From the lease, which only its owner may read."""
    try:
        return json.loads((run_dir / "lease.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError):
        return None


def _progress_lines(progress: RunProgress | None, run_dir: str | None) -> list[str]:
    if progress is None:
        return [f"{run_dir}: no step has ended yet"] if run_dir else []
    p, last = progress, progress.last
    state = "finished" if p.finished else f"last step {_ago(p.seconds_ago)} ago"
    lines = [f"{p.run_id or run_dir}  step {p.step}/{p.max_steps}  {state}"]
    if p.rewards:
        lines.append(f"reward  {sparkline(p.rewards)}  {p.rewards[0]:.3f} → {p.rewards[-1]:.3f}")
    if p.eval_reward is not None:
        lines.append(f"eval    {p.eval_reward:.3f} at step {p.eval_step}")
    facts = [
        ("lag", last.get("lag"), "{:g}"),
        ("tok/s", last.get("rollout_tokens_per_second"), "{:,.0f}"),
        ("push s", last.get("push_seconds"), "{:.2f}"),
        ("step s", last.get("seconds"), "{:.1f}"),
        ("waited s", last.get("wait_seconds"), "{:.1f}"),
        ("gap", last.get("logprob_gap"), "{:.1e}"),
    ]
    return [*lines, "        " + "  ".join(f"{n} {form.format(v)}" for n, v, form in facts if v is not None), ""]


def _server_lines(servers: Sequence[ServerRow]) -> list[str]:
    rows = [("server", "state", "run", "version", "lag", "running")]
    for server in servers:
        if not server.runs:
            rows.append((server.url, server.state, server.error or "-", "", "", ""))
        for run in server.runs:
            version = "-" if run.step is None else f"{run.fence}.{run.step}"
            lag = "-" if run.lag is None else str(run.lag)
            rows.append((server.url, server.state, run.run_id, version, lag, str(run.running_requests)))
    if len(rows) == 1:
        return []
    short = [row for row in rows if row[3]]  # an error may be as long as it is
    widths = [max(len(row[i]) for row in (rows if i < 2 else short)) for i in range(6)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def make_parser() -> argparse.ArgumentParser:
    """Flags of `learner status`."""
    parser = argparse.ArgumentParser(prog="learner status", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--rollout-url", "--rollout_url", nargs="+", help="as for `learner train`: URLs, dns+http://..., file:PATH")
    add("--run-dir", "--run_dir", help="output_dir of a training: its progress, too")
    add("--watch", nargs="?", type=_seconds, const=2.0, metavar="SECONDS", help="again and again (default: every 2 s)")
    add("--json", action="store_true", help="one JSON object, for programs; a line each time with --watch")
    add("--token-file", "--token_file", help="bearer token for the servers (default: $LOCKSTEP_TOKEN)")
    add("--ca-file", "--ca_file", help="certificate (PEM) of the CA that the servers' certificates are from")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("more than 0 seconds")
    return value
