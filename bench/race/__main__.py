"""Real trainings to an accuracy on held-out questions, ours beside TRL's: over seconds, and over samples.

VLLM_USE_FLASHINFER_SAMPLER=0 NCCL_NVLS_ENABLE=0 python -m bench.race --work-dir runs/race --deadline-s 500 \\
    --json race.json --plot race.png    # two GPUs: learners on GPU 0, all servers on GPU 1, where idle ones wait
python -m bench.race --quick            # two steps of one seed on the CPU, without TRL, whose server mode needs GPUs

For a seed all rows have the same initial adapter, prompts in the same order, batch, learning rate and number of
samples, and run one after the other. What the clock counts is in `bench.race.learner`. What ours take is compared
with TRL's server mode; its asynchronous trainer has the bound on staleness of our S=2. Rows come seed by seed, so that
a run that is cut off still compares, and a training that is done in --work-dir is not run again. On a CPU server and
learner have half of the cores each, as if each had a device of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.report import Row, fill, picture, table
from bench.contenders import trl_asynchronous
from bench.race.figures import against, by_name, summary, target_accuracy
from bench.race.trainings import COLORS, Training, TrainingsBench, draw_band
from bench.step.figures import ASYNCHRONOUS, TRL

#: Row -> the server's --apply (None: a trainer and a server of TRL), and the bound on staleness.
ROWS: dict[str, tuple[str | None, int]] = {
    "lockstep S=1": ("columns", 1),
    TRL: (None, 0),
    "lockstep S=2": ("columns", 2),
    ASYNCHRONOUS: (None, 2),
    "lockstep S=0": ("columns", 0),
    "lockstep merge S=1": ("merge", 1),
    "lockstep adapter S=1": ("adapter", 1),
}
NOTE = (
    f"{trl_asynchronous.NOTE}; what its options lack of the recipe's is left out: its loss has no KL term, and clips "
    "ratios to the server's logprobs in place of correcting by them"
)
#: The target: ours reaches the peer's final accuracy in at most this share of its seconds.
MOST_OF_TRL = 1 / 3


class RaceBench(TrainingsBench):
    """A row for every contender and seed."""

    name = "race"
    flags = {
        **TrainingsBench.flags,
        "--steps": (0, "of every training; 0: the recipe's"),
        "--target": (
            0.0,
            "accuracy to reach; 0: the final one of TRL less its spread over seeds, without it the lowest of all rows",
        ),
    }
    quick = "--config recipes/demo.yaml --seeds 42 --steps 2 --eval-every 1 --eval-size 8 --only 'lockstep S' "
    quick += "--row-limit-s 1800"
    row_names = tuple(ROWS)
    about = {"row": "row", "seed": "seed"}
    columns = {
        "right before": "{before:.3f}",
        "right after": "{after:.3f}",
        "seconds": "{seconds:.1f}",
        "step s": "{step_s:.2f}",
        "wait s": "{wait_s:.2f}",
        "sync s": "{sync_s:.3f}",
        "train s": "{train_s:.2f}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "learner bubble": "{learner_bubble:.0%}",
        "server bubble": "{server_bubble:.0%}",
        "max KL": "{max_drift_kl:.1e}",
        "lags": "{lags}",
    }
    what = "{row}, seed {seed}"

    def trainings(self) -> list[Training]:
        options = self.options
        steps = str(options.steps or self.recipe["max_steps"])
        found = []
        for seed in options.seeds:
            for row in options.only:
                apply, bound = ROWS[row]
                words = ["--seed", str(seed), "--max_steps", steps, "--max_staleness", str(bound)]
                # Stale samples need it; so that all rows have the same loss, all have it.
                words += ["--vllm_importance_sampling_correction", "true"]
                note = {"note": NOTE} if row == ASYNCHRONOUS else {}
                about = self.about_row(row, seed=seed, max_staleness=bound, steps=int(steps), **note)
                found.append(self.training(about, apply, *words))
        return found

    def summary(self) -> list[dict[str, Any]]:
        """Return a row for every contender, over its seeds."""
        done = self.measured()
        target = self.options.target or (target_accuracy(done, TRL) if done else 0.0)
        return summary(done, target, "row")

    def table(self) -> str:
        summed = self.summary()
        if not summed:
            return super().table()
        columns = {
            "seeds": "{seeds}",
            "right before": "{before:.3f}",
            "right after": "{final:.3f}",
            "standard deviation": "{deviation:.3f}",
            "seconds": "{seconds:.1f}",
            f"s to {summed[0]['target']:.3f}": "{seconds_to_target:.1f}",
            "samples to it": "{samples_to_target:,.0f}",
            "step s": "{step_s:.2f}",
            "tokens/s": "{tokens_per_s:,.0f}",
            "learner bubble": "{learner_bubble:.0%}",
            "server bubble": "{server_bubble:.0%}",
        }
        return f"{super().table()}\n\n{table(summed, {'row': 'row'}, columns, 'final')}"

    def shares(self) -> dict[str, dict[str, float]]:
        """Return what our rows took to TRL's final accuracy, see `against`."""
        rows = self.measured()
        found = {row: against(rows, row, TRL) for row in ROWS if row != TRL}
        return {row: shares for row, shares in found.items() if shares}

    def headline(self, done: Sequence[Row]) -> str:
        told = "{row}: {final:.3f} right ({deviation:.3f}) after {seconds:.0f} s, {seeds} seeds"
        told += ", {target:.3f} after {seconds_to_target:.0f} s and {samples_to_target:,.0f} samples"
        texts = [fill(told, row) for row in self.summary()]
        told = "{row} reaches TRL's final accuracy in {seconds:.2f} of its seconds and {samples:.2f} of its samples; "
        told += "that less its spread, where both first do, in {seconds_to_target:.2f} and {samples_to_target:.2f}"
        texts += [fill(told, {"row": row, **shares}) for row, shares in self.shares().items()]
        return f"on {self.where}: {'; '.join(texts)}"

    def document(self) -> dict[str, Any]:
        shares = self.shares()
        # At no more samples: all trainings have the same number of them.
        reached = {row: shares[row].get("seconds", math.inf) <= MOST_OF_TRL for row in shares if row != ASYNCHRONOUS}
        return super().document() | {"summary": self.summary(), "of_trl": shares, "reached": reached}

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        """Draw accuracy over seconds and over samples: means, and a standard deviation above and below."""
        title = f"{self.model_name}, {self.options.eval_size} held-out questions"
        title += ", mean and standard deviation of seeds" if len({row["seed"] for row in done}) > 1 else ""
        with picture(path, 11, 4.8, title, panels=2, loc="outside lower center", ncols=3, fontsize=8) as panels:
            for axes, key, label in zip(panels, ("seconds", "samples"), ("seconds", "samples trained on"), strict=True):
                for (row,), mine in by_name(done, "row").items():
                    seeds = f"{len(mine)} seed{'s' if len(mine) > 1 else ''}"
                    draw_band(axes, mine, key, COLORS[list(ROWS).index(row)], f"{row} ({seeds})")
                axes.set_xlabel(label)
                axes.grid(alpha=0.25)
            panels[0].set_ylabel("held-out questions right")
            panels[0].set_ylim(0, 1)


if __name__ == "__main__":
    sys.exit(RaceBench().main())
