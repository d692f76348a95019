"""`learner status`: what the rollout servers serve, and the progress of a run, during training and afterwards.

With `--serve` it serves the page of a run, or of all runs of a folder laid over one another.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from learner.commands.flags import Parser, either_spelling, number
from learner.monitors.charts import sparkline
from learner.monitors.page_server import serve_page
from learner.monitors.run_reader import find_runs
from learner.run_dir.files import (
    HISTORY_FILE,
    LEASE_FILE,
    LOGS_FILE,
    STATE_FILE,
    SUMMARY_FILE,
    finite,
    is_step,
    read_lines,
)
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.servers.discovery import ServerDiscovery
from learner.utils.threads import all_of
from shared.errors import InvalidRequest, LockstepError
from shared.weights import RunState

#: Port of `--serve` where none is given.
PAGE_PORT = 8700
_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class RunRow:
    """One run on one server.

    Attributes:
        lag: optimizer steps behind the newest known version of the run.
        finished: its training has ended, and another run may get its place, if it is not kept for `kept_seconds` more.
    """

    run_id: str
    step: int | None
    fence: int | None
    lag: int | None
    running_requests: int
    finished: bool = False
    kept_seconds: float | None = None
    seconds_since_push: float | None = None


@dataclass(frozen=True)
class ServerRow:
    """One server; `error` says why its state is unknown."""

    url: str
    state: str
    model: str | None = None
    epoch: str | None = None
    runs: tuple[RunRow, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run, read from its directory.

    Attributes:
        run_id: None if the directory has no readable lease.
        seconds_ago: seconds since the last step.
        error: why the training ended, if it has failed.
        rewards: one per step that had a reward.
        last: fields of the last step's `learner.step_metrics.StepReport`.
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
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 1 if no server, or not the run directory, gave the state asked for."""
    options = make_parser().parse_args(argv)
    if options.serve:
        if options.rollout_url or options.run_dir or options.watch or options.json:
            raise InvalidRequest(
                "--serve shows runs in a browser: leave --rollout-url, --run-dir, --watch and --json out"
            )
        return _serve(Path(options.serve), options.page_host, options.page_port)
    if not options.rollout_url and not options.run_dir:
        raise InvalidRequest("give --rollout-url, --run-dir, or both; or --serve")
    discovery = ServerDiscovery(options.rollout_url) if options.rollout_url else None
    connect = cache(partial(RolloutClient, token=read_token(options.token_file), ca_file=options.ca_file))
    while True:
        progress = read_progress(Path(options.run_dir)) if options.run_dir else None
        servers = ask_servers(discovery.urls() if discovery else (), connect, progress)
        if options.json:
            shown = json.dumps({"servers": [asdict(s) for s in servers], "run": progress and asdict(progress)})
        else:
            table = server_lines(servers, options.rollout_url or ())
            shown = "\n".join([*_progress_lines(progress, options.run_dir), *table])
        print((_CLEAR if options.watch and sys.stdout.isatty() and not options.json else "") + shown, flush=True)
        if not options.watch:
            run_is_known = progress is not None or not options.run_dir
            return 0 if run_is_known and (not discovery or any(not s.error for s in servers)) else 1
        time.sleep(options.watch)


def _serve(folder: Path, host: str, port: int) -> int:
    """Serve the page until the process is interrupted."""
    if not folder.is_dir():
        raise InvalidRequest(f"--serve {folder} is not a directory; give a run's output_dir, or a folder of such")
    runs = find_runs(folder)
    url = serve_page(folder, host, port, "--page-port")
    print(f"{', '.join(runs) or 'no run yet'}: {url}  (Ctrl-C ends)", flush=True)
    threading.Event().wait()
    return 0


def read_progress(run_dir: Path) -> RunProgress | None:
    """Read the progress of the run in `run_dir`; None before its first step.

    Raises:
        LockstepError: `invalid_request` if `run_dir` is not a directory.
    """
    if not run_dir.is_dir():
        raise InvalidRequest(f"run_dir {run_dir} is not a directory; give a run's output_dir")
    history, summary, state = (run_dir / name for name in (HISTORY_FILE, SUMMARY_FILE, STATE_FILE))
    # Other programs keep a file of this name, too.
    rows = [row for row in read_lines(history) if is_step(row.get("max_steps"))]
    if not rows:
        return None
    evals = [row for row in read_lines(run_dir / LOGS_FILE) if finite(row.get("eval_reward")) is not None]
    last, evaluated = rows[-1], evals[-1] if evals else {}
    return RunProgress(
        run_id=_field(run_dir / LEASE_FILE, "run_id"),  # which only the owner of the files may read
        step=last["step"],
        max_steps=last["max_steps"],
        seconds_ago=max(time.time() - history.stat().st_mtime, 0.0),
        finished=_is_newer(summary, history),
        rewards=[value for row in rows if (value := finite(row.get("reward"))) is not None],
        eval_reward=evaluated.get("eval_reward"),
        eval_step=evaluated.get("step"),
        last={name: None if isinstance(v, float) and finite(v) is None else v for name, v in last.items()},
        error=_field(state, "error") if _is_newer(state, history) else last.get("error"),
    )


def _is_newer(path: Path, other: Path) -> bool:
    return path.is_file() and path.stat().st_mtime >= other.stat().st_mtime


def _field(path: Path, name: str) -> str | None:
    """Return a field of a JSON file that is text; None where there is none."""
    try:
        value = json.loads(path.read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def ask_servers(
    urls: Sequence[str], connect: Callable[[str], RolloutClient], progress: RunProgress | None = None
) -> list[ServerRow]:
    """Query all servers at once; one that cannot be reached is a row with an error."""

    def ask(url: str) -> tuple[ServerRow, Sequence[RunState]]:
        try:
            state = connect(url).state(timeout_s=5.0)
        except LockstepError as error:
            return ServerRow(url, "away", error=str(error)), ()
        readiness = "draining" if state.draining else "ready" if state.ready else "not ready"
        return ServerRow(url, readiness, state.model, state.epoch), state.runs

    replies = all_of([partial(ask, url) for url in urls], "status")
    known = [(run.run_id, run.version.step) for _, runs in replies for run in runs if run.version]
    if progress and progress.run_id:
        known.append((progress.run_id, progress.step))
    newest = dict(sorted(known))  # of several steps of a run, the highest comes last and stays

    def row_of(run: RunState) -> RunRow:
        end = (run.finished, run.kept_seconds, run.seconds_since_push)
        if not (version := run.version):
            return RunRow(run.run_id, None, None, None, run.running_requests, *end)
        lag = newest[run.run_id] - version.step
        return RunRow(run.run_id, version.step, version.fence, lag, run.running_requests, *end)

    return [replace(row, runs=tuple(map(row_of, runs))) for row, runs in replies]


def _progress_lines(progress: RunProgress | None, run_dir: str | None) -> list[str]:
    if progress is None:
        if not run_dir:
            return []
        error = _field(Path(run_dir, STATE_FILE), "error")
        return [f"{run_dir}: no step has ended" + (f"; failed: {error}" if error else " yet")]
    p, last = progress, progress.last
    state = "finished" if p.finished else f"last step {_ago(p.seconds_ago)} ago"
    lines = [f"{p.run_id or run_dir}  step {p.step}/{p.max_steps}  {state}"]
    lines += [f"failed  {p.error}"] if p.error and not p.finished else []
    if p.rewards:
        lines.append(f"reward  {sparkline(p.rewards)}  {p.rewards[0]:.3f} → {p.rewards[-1]:.3f}")
    if p.eval_reward is not None:
        lines.append(f"eval    {p.eval_reward:.3f} at step {p.eval_step}")
    facts = [
        ("lag", last.get("lag"), "{:g}"),
        ("tok/s", last.get("rollout_tokens_per_second"), "{:,.0f}"),
        ("training tok/s", last.get("train_tokens_per_second"), "{:,.0f}"),
        ("of peak", last.get("flops_utilisation"), "{:.0%}"),
        ("push s", last.get("push_seconds"), "{:.2f}"),
        ("step s", last.get("seconds"), "{:.1f}"),
        ("waited s", last.get("wait_seconds"), "{:.1f}"),
        ("gap", last.get("logprob_gap"), "{:.1e}"),
    ]
    return [
        *lines,
        "        " + "  ".join(f"{n} {form.format(v)}" for n, v, form in facts if finite(v) is not None),
        "",
    ]


def server_lines(servers: Sequence[ServerRow], sources: Sequence[str]) -> list[str]:
    """Return the servers and their runs as lines of a table; where there are none, that `sources` name none."""
    rows = [("server", "state", "run", "version", "lag", "running", "last push", "training")]
    for server in servers:
        if not server.runs:
            rows.append((server.url, server.state, server.error or "-", "", "", "", "", ""))
        for run in server.runs:
            version = "-" if run.step is None else f"{run.fence}.{run.step}"
            lag = "-" if run.lag is None else str(run.lag)
            pushed = "-" if run.seconds_since_push is None else f"{_ago(run.seconds_since_push)} ago"
            kept = f", kept {_ago(run.kept_seconds)} more" if run.kept_seconds else ""
            training = f"finished{kept}" if run.finished else "not finished"
            row = (run.run_id, version, lag, str(run.running_requests), pushed, training)
            rows.append((server.url, server.state, *row))
    if len(rows) == 1:
        return [f"{' '.join(sources)}: no server is there now"] if sources else []
    short = [row for row in rows if row[3]]  # errors may be of any length
    widths = [max(len(row[i]) for row in (rows if i < 2 else short)) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of `learner status`."""
    parser = Parser(prog="learner status", description=__doc__)
    add = either_spelling(parser)
    add("--rollout-url", nargs="+", help="as for `learner train`: URLs, dns+http://NAME:PORT, file:PATH, ray:NAME")
    add("--run-dir", help="a run's output_dir, to show its progress")
    add(
        "--watch",
        nargs="?",
        type=number(float, above=0, most=1e6),
        const=2.0,
        metavar="SECONDS",
        help="repeat every SECONDS (default: 2)",
    )
    add(
        "--serve",
        metavar="RUN_DIR",
        help="serve the page of the run in RUN_DIR, or of the runs in its subfolders, until Ctrl-C; it shows new steps "
        "as they are written",
    )
    add(
        "--page-port",
        type=number(int, 0, 65535),
        default=PAGE_PORT,
        help="port of --serve; 0 takes a free one (default %(default)s)",
    )
    add(
        "--page-host",
        default="127.0.0.1",
        help="address of --serve; anywhere but on the loopback the page needs the token in the URL that is printed "
        "(default %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object; with --watch, one per line")
    add("--token-file", help="file with the servers' bearer token (default: $LOCKSTEP_TOKEN)")
    add("--ca-file", help="CA certificate (PEM) to verify the servers' certificates with")
    return parser
