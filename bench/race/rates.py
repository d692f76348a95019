"""What small updates that vanish in bfloat16 mean for learning: one rounding beside two, at several learning rates.

VLLM_USE_FLASHINFER_SAMPLER=0 python -m bench.race.rates --work-dir runs/rates --parallel 4 --deadline-s 540 \\
    --json rates.json --plot rates.png                 # one GPU: learners and both servers on it
python -m bench.race.rates --quick                     # two steps on the CPU

`one rounding`: the server holds adapters as columns of its weights, the learner computes base and adapter as one
product. `two roundings`: the server adds the adapter by vLLM's LoRA kernels, the learner's passes are TRL's and PEFT's
under autocast. Both have bfloat16 weights, the same prompts, and wait for each other's batches (S = 0). Several
trainings run at once, each a run of the servers: seconds mean nothing here.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.report import Row, fill, picture, table
from bench.race.figures import by_name, summary
from bench.race.trainings import COLORS, Training, TrainingsBench, draw_band
from learner.monitors.charts import trailing_mean

#: Row -> the server's --apply, and options of the learner.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one rounding": ("columns", ("--packed_passes", "true")),
    "two roundings": ("adapter", ("--packed_passes", "false")),
}


class RatesBench(TrainingsBench):
    """A row for every arithmetic, learning rate and seed."""

    name = "race.rates"
    flags = {
        **TrainingsBench.flags,
        "--rates": ("1e-5:60,1e-4:60,1e-6:60", "learning rates and the steps of each, the most important first"),
        "--parallel": (4, "trainings at once"),
        "--eval-every": (20, "steps between two evaluations"),
        "--row-limit-s": (500.0, "end a training that takes longer"),
    }
    quick = "--seeds 42 --rates 1e-5:2 --batch 16 --eval-every 1 --eval-size 8 --parallel 1 --row-limit-s 1800"
    row_names = tuple(ROWS)
    about = {"learning rate": "lr", "row": "row", "seed": "seed"}
    columns = {
        "steps": "{steps}",
        "right before": "{before:.3f}",
        "right after": "{after:.3f}",
        "reward, first fifth": lambda row: f"{ends(row['rewards'])[0]:.3f}",
        "reward, last fifth": lambda row: f"{ends(row['rewards'])[1]:.3f}",
        "max gap": "{max_logprob_gap:.2f}",
    }
    what = "lr {lr:g}, {row}, seed {seed}"

    def check(self) -> None:
        super().check()
        pairs = [pair.split(":") for pair in self.options.rates.split(",")]
        self.options.rates = [(float(rate), int(steps)) for rate, steps in pairs]
        self.at_least(1, "parallel")

    @property
    def learners(self) -> int:
        return int(self.options.parallel)

    def trainings(self) -> list[Training]:
        found = []
        for seed in self.options.seeds:
            for rate, steps in self.options.rates:
                for row in self.options.only:
                    apply, words = ROWS[row]
                    words += ("--seed", str(seed), "--max_steps", str(steps), "--learning_rate", str(rate))
                    about = self.about_row(row, lr=rate, seed=seed, steps=steps)
                    found.append(self.training(about, apply, *words))
        return found

    def summary(self) -> list[dict[str, Any]]:
        """Return a row for every learning rate and arithmetic, over seeds."""
        return summary(self.measured(), 0.0, "lr", "row")

    def table(self) -> str:
        columns = {
            "seeds": "{seeds}",
            "right before": "{before:.3f}",
            "right after": "{final:.3f}",
            "standard deviation": "{deviation:.3f}",
        }
        return f"{super().table()}\n\n{table(self.summary(), {'lr': 'lr', 'row': 'row'}, columns, 'final')}"

    def headline(self, done: Sequence[Row]) -> str:
        told = "lr {lr:g}, {row}: {before:.3f} -> {final:.3f} right ({deviation:.3f}), {seeds} seeds"
        return f"on {self.where}: {'; '.join(fill(told, row) for row in self.summary())}"

    def document(self) -> dict[str, Any]:
        return super().document() | {"summary": self.summary()}

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        """Draw accuracy and sampled reward over samples, a panel for every learning rate."""
        rates = sorted({row["lr"] for row in done})
        title = f"{self.model_name} in bfloat16, held-out questions and sampled reward"
        size = 3.2 + 3.2 * len(rates), 4.6
        with picture(path, *size, title, panels=len(rates), loc="outside lower center", ncols=2, fontsize=8) as panels:
            for axes, rate in zip(panels, rates, strict=True):
                for (row,), mine in by_name([row for row in done if row["lr"] == rate], "row").items():
                    color = COLORS[list(ROWS).index(row)]
                    draw_band(axes, mine, "samples", color, f"{row}: held out, mean and deviation of seeds")
                    draw_rewards(axes, mine, color, f"{row}: sampled reward, mean of 8 steps and of seeds")
                axes.set_title(f"learning rate {rate:g}", fontsize=9)
                axes.set_xlabel("samples trained on")
                axes.grid(alpha=0.25)
            panels[0].set_ylabel("right")


def draw_rewards(axes: Any, rows: Sequence[Row], color: str, label: str) -> None:
    """Draw the mean reward of the sampled answers."""
    means = [statistics.fmean(values) for values in zip(*(row["rewards"] for row in rows), strict=False)]
    last = rows[0]["points"][-1]
    x = [(i + 1) * last["samples"] / last["step"] for i in range(len(means))]
    axes.plot(x, trailing_mean(means, 8), color=color, linestyle=":", linewidth=1.3, label=label)


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last fifth of the values, of at least one."""
    size = max(1, len(values) // 5)
    return statistics.fmean(values[:size]), statistics.fmean(values[-size:])


if __name__ == "__main__":
    sys.exit(RatesBench().main())
