"""What the demo learns, and how long that takes, with rollouts that run ahead and without, over several seeds.

python -m bench.staleness --json staleness.json --plot staleness.png --work-dir runs/staleness     # hours on two cores
python -m bench.staleness --quick                                                                  # two steps, one seed

Server and learner get half of the cores each, so that each has a device of its own as it would have with GPUs: on
shared cores they only take time from each other. All trainings have TRL's importance correction, and run one after the
other, those of a seed next to each other. A training whose summary is in --work-dir already is not run again.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.common.harness import Bench
from bench.common.report import Row, cpu_name, picture
from learner.demo.__main__ import RECIPE
from learner.evaluation.statistics import wilson_interval
from learner.monitors.charts import trailing_mean
from learner.utils.processes import ProcessGroup

COLORS = ("#2f6fb0", "#e08a2c", "#3a8f4d", "#8b5fbf")


class StalenessBench(Bench):
    """Trainings of the demo, a row for every bound and seed."""

    name = "staleness"
    standard = "plot"
    flags = {
        "--config": (str(RECIPE), "a recipe for the demo"),
        "--staleness": ("0,1", "bounds to compare"),
        "--seeds": ("42,43,44", "each with every bound"),
        "--steps": (48, ""),
        "--eval-size": (128, "held-out questions"),
        "--work-dir": (Path, "keeps everything; trainings that are done there are not repeated"),
    }
    quick = "--seeds 42 --steps 2 --eval-size 8"
    figure = "eval_after"
    about = {"S": "max_staleness", "seed": "seed"}
    columns = {
        "right before": "{eval_before:.3f}",
        "right after": "{eval_after:.3f}",
        "steps": "{steps}",
        "training s": "{train_seconds:.0f}",
        "s a step": lambda row: f"{statistics.median(row['step_seconds']):.1f}",
        "max KL": "{max_drift_kl:.1e}",
        "lags": "{lags}",
    }
    what = "S = {max_staleness}, seed {seed}"
    told = "right {eval_before:.3f} -> {eval_after:.3f}, {train_seconds:.0f} s"

    def check(self) -> None:
        self.numbers("seeds", "staleness")

    def pick_devices(self) -> list[str]:
        self.device, self.server_device = "cpu", None
        return [cpu_name()]

    def run(self) -> None:
        for seed, bound in itertools.product(self.options.seeds, self.options.staleness):
            about = {"max_staleness": bound, "seed": seed}
            with self.failure_kept(about):
                self.add(about, self.train(bound, seed))

    def train(self, bound: int, seed: int) -> dict[str, Any]:
        """Run the demo; return its summary and its steps.

        Raises:
            RuntimeError: it failed.
        """
        options, out = self.options, self.work / f"s{bound}-seed{seed}"
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "summary.json").exists():
            recipe = yaml.safe_load(Path(options.config).read_text())
            recipe |= {"max_staleness": bound, "vllm_importance_sampling_correction": True}
            recipe |= {"max_steps": options.steps, "eval_size": options.eval_size, "eval_steps": options.steps}
            (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            files = ["--config", str(out / "recipe.yaml"), "--output-dir", str(out)]
            command = [sys.executable, "-m", "learner.demo", "--split-cores", *files, "--seed", str(seed)]
            with ProcessGroup(command, {}, out / "demo.log") as demo:
                if demo.process.wait():
                    raise RuntimeError(f"the demo failed: ...{(out / 'demo.log').read_text()[-600:]}")
        result = json.loads((out / "summary.json").read_text())
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves = {"step_seconds": [step["seconds"] for step in steps], "rewards": [step["reward"] for step in steps]}
        return result | curves

    def headline(self, done: Sequence[Row]) -> str:
        texts = []
        for bound in sorted({row["max_staleness"] for row in done}):
            mine = [row for row in done if row["max_staleness"] == bound]
            after, seconds = [row["eval_after"] for row in mine], statistics.fmean(row["train_seconds"] for row in mine)
            deviation = f" (standard deviation {statistics.stdev(after):.3f})" if len(after) > 1 else ""
            mean = f"{statistics.fmean(after):.3f}{deviation}"
            texts.append(f"S = {bound}: {mean} right after {seconds:.0f} s, {len(mine)} seeds")
        return f"on {self.where}, a half each for server and learner: {'; '.join(texts)}"

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        """Draw reward over seconds of training, and what was right afterwards."""
        title = f"the demo, {self.options.steps} steps, a core each for server and learner"
        with picture(path, 8.5, 4.8, title, loc="outside lower center", ncols=2, fontsize=8) as axes:
            bounds = sorted({row["max_staleness"] for row in done})
            labeled = set[int]()
            for row in done:
                bound, after = row["max_staleness"], row["eval_after"]
                first = bound not in labeled
                labeled.add(bound)
                color, start = COLORS[bounds.index(bound) % len(COLORS)], f"S = {bound}: " if first else "_"
                ends = list(itertools.accumulate(row["step_seconds"]))
                label = f"{start}sampled reward, mean of 5 steps"
                axes.plot(ends, trailing_mean(row["rewards"], 5), color=color, alpha=0.8, linewidth=1.3, label=label)
                low, high = wilson_interval(after, row["eval_questions"])
                ranges, label = [[after - low], [high - after]], f"{start}held-out questions right, 95% interval"
                axes.errorbar([ends[-1]], [after], ranges, color=color, fmt="D", markersize=5, capsize=3, label=label)
            axes.set_xlabel("seconds of training")
            axes.set_ylabel("share of right answers")
            axes.set_ylim(0, 1)
            axes.grid(alpha=0.25)


if __name__ == "__main__":
    sys.exit(StalenessBench().main())
