"""What the demo learns, and how long that takes, with rollouts that run ahead and without, over several seeds.

python -m bench.staleness --json staleness.json --plot staleness.png --work-dir runs/staleness     # hours on two cores
python -m bench.staleness --quick                                                                  # two steps, one seed

Server and learner get half of the cores each, so that each has a device of its own as it would have with GPUs: on
shared cores they only take time from each other. All trainings have TRL's importance correction, and run one after the
other, those of a seed next to each other. A training whose summary is in --work-dir already is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.common.report import Row, Told, aligned, cpu_name, describe, machine
from learner.demo.__main__ import RECIPE
from learner.evaluation.statistics import wilson_interval
from learner.monitors.charts import trailing_mean
from learner.utils.processes import ProcessGroup, Stopped, stop_on_signals

COLORS = ("#2f6fb0", "#e08a2c", "#3a8f4d", "#8b5fbf")
COLUMNS = ("S", "seed", "right before", "right after", "steps", "training s", "s a step", "max KL", "lags")


class StalenessReport(Told):
    """Rows of trainings of the demo."""

    figure = "eval_after"

    def line(self, row: Row) -> str:
        about = f"S = {row['max_staleness']}, seed {row['seed']}"
        if "eval_after" not in row:
            return f"{about}: {row['error']}"
        return f"{about}: right {row['eval_before']:.3f} -> {row['eval_after']:.3f}, {row['train_seconds']:.0f} s"

    def headline(self, done: Sequence[Row]) -> str:
        if not done:
            return "nothing was measured"
        bounds = sorted({row["max_staleness"] for row in done})
        told = [f"S = {bound}: {summary(done, bound)}" for bound in bounds]
        return f"on {', '.join(self.machine['devices'])}, a half each for server and learner: {'; '.join(told)}"


def summary(rows: Sequence[Row], bound: int) -> str:
    """Mean and standard deviation over the seeds of a bound."""
    mine = [row for row in rows if row["max_staleness"] == bound]
    after, seconds = [row["eval_after"] for row in mine], [row["train_seconds"] for row in mine]
    spread = f" (standard deviation {statistics.stdev(after):.3f})" if len(after) > 1 else ""
    return f"{statistics.fmean(after):.3f}{spread} right after {statistics.fmean(seconds):.0f} s, {len(mine)} seeds"


def train(work: Path, options: argparse.Namespace, bound: int, seed: int) -> dict[str, Any]:
    """One run of the demo; its summary and its steps.

    Raises:
        RuntimeError: it failed.
    """
    out = work / f"s{bound}-seed{seed}"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "summary.json").exists():
        recipe = yaml.safe_load(Path(options.config).read_text())
        recipe |= {
            "max_staleness": bound,
            "vllm_importance_sampling_correction": True,
            "max_steps": options.steps,
            "eval_size": options.eval_size,
        }
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [
            sys.executable,
            "-m",
            "learner.demo",
            "--split-cores",
            "--config",
            str(out / "recipe.yaml"),
            "--output-dir",
            str(out),
            "--seed",
            str(seed),
        ]
        with ProcessGroup(command, {}, out / "demo.log") as demo:
            if demo.process.wait():
                raise RuntimeError(f"the demo failed: ...{(out / 'demo.log').read_text()[-600:]}")
    result = json.loads((out / "summary.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves = {"step_seconds": [step["seconds"] for step in steps], "rewards": [step["reward"] for step in steps]}
    return result | curves


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Reward over seconds of training, and what was right afterwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in rows if "eval_after" in row]
    figure = Figure(figsize=(8.5, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    bounds = sorted({row["max_staleness"] for row in done})
    for row in done:
        color = COLORS[bounds.index(row["max_staleness"]) % len(COLORS)]
        first = row is next(other for other in done if other["max_staleness"] == row["max_staleness"])
        ends = [sum(row["step_seconds"][: i + 1]) for i in range(len(row["step_seconds"]))]
        axes.plot(
            ends,
            trailing_mean(row["rewards"], 5),
            color=color,
            alpha=0.8,
            linewidth=1.3,
            label=f"S = {row['max_staleness']}: sampled reward, mean of 5 steps" if first else None,
        )
        low, high = wilson_interval(row["eval_after"], row["eval_questions"])
        after = row["eval_after"]
        axes.errorbar(
            [ends[-1]],
            [after],
            yerr=[[after - low], [high - after]],
            color=color,
            fmt="D",
            markersize=5,
            capsize=3,
            label=f"S = {row['max_staleness']}: held-out questions right, 95% interval" if first else None,
        )
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("share of right answers")
    axes.set_ylim(0, 1)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    if done:
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def table(rows: Sequence[Row]) -> str:
    """All trainings."""
    return aligned([COLUMNS, *(cells(row) for row in rows if "eval_after" in row)], right={0, 1, 4, 5, 6})


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    drift = row.get("max_drift_kl")
    return (
        str(row["max_staleness"]),
        str(row["seed"]),
        f"{row['eval_before']:.3f}",
        f"{row['eval_after']:.3f}",
        str(row["steps"]),
        f"{row['train_seconds']:.0f}",
        f"{statistics.median(row['step_seconds']):.1f}",
        f"{drift:.1e}" if drift is not None else "-",
        str(row["lags"]),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if no training failed."""
    options = make_parser().parse_args(argv)
    if options.quick:
        options.seeds, options.steps, options.eval_size = "42", 2, 8
    command = shlex.join(["python", "-m", "bench.staleness", *(sys.argv[1:] if argv is None else argv)])
    report = StalenessReport(options.json, machine([cpu_name()], command))
    stopped = False
    with tempfile.TemporaryDirectory(prefix="bench-staleness-") as scratch:
        try:
            with stop_on_signals():
                for seed in map(int, options.seeds.split(",")):
                    for bound in map(int, options.staleness.split(",")):
                        row: dict[str, Any] = {"max_staleness": bound, "seed": seed, "ok": True}
                        try:
                            row |= train(options.work_dir or Path(scratch), options, bound, seed)
                        except Exception as error:
                            row |= {"ok": False, "error": describe(error)}
                        report.add(row)
        except Stopped as signal:
            print(f"bench: stopped by {signal}", file=sys.stderr)
            stopped = True
    report.write()
    if options.plot:
        plot(options.plot, report.rows, f"the demo, {options.steps} steps, a core each for server and learner")
    document = report.document()
    print("\n" + table(report.rows) + "\n\n" + document["headline"], flush=True)
    return 0 if document["ok"] and not stopped else 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.staleness", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="two steps, one seed, eight questions")
    add("--json", type=Path, help="written after every training")
    add("--plot", type=Path, help="a PNG")
    add("--config", default=str(RECIPE), help="a recipe for the demo")
    add("--staleness", default="0,1", help="bounds to compare")
    add("--seeds", default="42,43,44", help="each with every bound")
    add("--steps", type=int, default=48)
    add("--eval-size", type=int, default=128, help="held-out questions")
    add("--work-dir", type=Path, help="keeps everything, and takes from there what was done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
