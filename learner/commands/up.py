"""`learner up`: a rollout server and a learner on this machine, or several on a cluster, until the training ends.

Both come from one recipe. Every flag of `learner train` is taken too. The server gets a GPU of its own, or takes turns
with the learner on one (`share_gpu: true`), or runs on the CPU (`use_cpu: true`). Its own flags stand under `server:`
in the recipe, where `gpus` chooses its GPUs, and variables of both under `env:`. Of several files, a later one changes
single lines of these. The run's page is served on 127.0.0.1, at port 8700 or a free one, or at `--page_port`. The same
command goes on where an interrupted training stopped.

With `--cluster` Ray places servers and learner on the machines of a cluster, and starts servers again where they fail
(docs/scaling.md).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.commands.flags import Parser, either_spelling, is_true, number, tied, words
from learner.commands.up_output import Output, say
from learner.commands.up_recipe import ADDRESS, Recipe, read_recipe
from learner.monitors.page_server import CHOSEN_PORT
from learner.run_dir.checkpoint import last_checkpoint
from learner.run_dir.lock import UP_LOCK, OutputLock
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.utils.gpus import visible_gpus
from learner.utils.ports import check_port, free_port
from learner.utils.processes import (
    ProcessGroup,
    Stopped,
    ending,
    module_command,
    module_environment,
    stop_on_signals,
)
from shared.errors import InvalidRequest, LockstepError, Unauthenticated

#: Where the run's page is served, unless the recipe says where or the port is taken.
PAGE_PORT = 8700
SERVER_LOG, LEARNER_LOG = "server.log", "learner.log"
#: Of both processes, unless the user has set them.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
#: Where both run on the CPU; no core is reserved: they take turns on the same ones, or have cores of their own.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "DS_ACCELERATOR": "cpu"}
#: Seconds for a learner to finish its step and save it.
LEARNER_PATIENCE_S = 120.0
_PROGRESS_S = 15.0
CLUSTER_FLAGS = ("servers", "gpus_per_server", "cpus_per_server", "learner_gpus", "learner_nodes", "learner_cpus")


@dataclass
class Plan:
    """What is started, and where.

    Attributes:
        server, learner: commands.
        environment, server_environment, learner_environment: for both; for one of them.
        recipe_environment: for both, instead of the user's own, as `learner train` takes it.
        server_cores, learner_cores: None: all of them.
        places: of the server and of the learner, in words.
    """

    url: str
    output_dir: Path
    server: list[str]
    learner: list[str]
    places: tuple[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    server_environment: dict[str, str] = field(default_factory=dict)
    learner_environment: dict[str, str] = field(default_factory=dict)
    recipe_environment: dict[str, str] = field(default_factory=dict)
    server_cores: list[int] | None = None
    learner_cores: list[int] | None = None


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: the learner's, 1 if the server ended first, 130 if stopped."""
    recipe = read(argv)
    if recipe.options.cluster:
        from learner.commands import up_on_cluster  # which shares the flags of this module

        return up_on_cluster.run(recipe)
    if given := [name for name in CLUSTER_FLAGS if getattr(recipe.options, name) is not None]:
        raise InvalidRequest(f"--{given[0]} is for a Ray cluster: give --cluster auto as well")
    return run(plan_here(recipe))


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags that are not those of `learner train`."""
    parser = Parser(prog="learner up", description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--config", action="append", metavar="FILE.yaml", help="a file, or the name of one of our recipes")
    add(
        "--server-flags",
        "--server_flags",
        type=words,
        action="extend",
        metavar="FLAGS",
        help="more flags of rollout-server, in one string: '--max-num-seqs 64 --enforce-eager'",
    )
    add(
        "--split-cores",
        "--split_cores",
        action="store_true",
        help="on the CPU: give server and learner half of the cores each, like two devices",
    )
    add = either_spelling(parser)
    whole = number(int, 1)
    add("--cluster", metavar="ADDRESS", help="run on a Ray cluster: auto, HOST:6379, or ray://HOST:10001")
    add(
        "--servers",
        type=_servers,
        metavar="N|N..M",
        help="rollout servers on the cluster (default: 1); N to M as it has room",
    )
    add(
        "--gpus-per-server",
        type=whole,
        metavar="N",
        help="GPUs of each of them, on several nodes where none has so many (default: 1; none with use_cpu)",
    )
    add("--cpus-per-server", type=whole, metavar="N", help="cores that Ray reserves for each of them (default: 1)")
    add(
        "--learner-gpus",
        type=whole,
        metavar="N",
        help="GPUs of the learner, a rank on each, on several nodes where none has so many (default: 1; none with "
        "use_cpu)",
    )
    add(
        "--learner-nodes",
        type=whole,
        metavar="N",
        help="nodes of the learner, each with the same number of its GPUs (default: as few as have them)",
    )
    add(
        "--learner-cpus",
        type=whole,
        metavar="N",
        help="cores that Ray reserves for the learner (default: 1 for each rank)",
    )
    return parser


def _servers(text: str) -> tuple[int, int]:
    """Read a number of servers, or the least and the most, as a `type` of argparse."""
    if not (match := re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor LEAST..MOST, as in 2..8")
    least, most = int(match[1]), int(match[2] or match[1])
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text}: at least 1, and no more at least than at most")
    return least, most


def read(argv: Sequence[str]) -> Recipe:
    """Read flags and recipes; raises `invalid_request` (`read_recipe`)."""
    return read_recipe(*make_parser().parse_known_args(tied(argv)))


def make_plan(argv: Sequence[str]) -> Plan:
    """Read flags and recipes, and decide where both processes run on this machine.

    Raises:
        InvalidRequest: see `read_recipe`; or this machine has no place for them.
    """
    return plan_here(read(argv))


def plan_here(recipe: Recipe) -> Plan:
    """Decide where both processes run on this machine; raises `invalid_request` if it has no place for them."""
    given, server, output_dir = recipe.given, recipe.server, recipe.output_dir
    gpus = server.pop("gpus", None)
    split = recipe.options.split_cores
    placed = _place_on_cpu(split=split) if is_true(given, "use_cpu") else _place_on_gpus(given, gpus)
    port = str(server.pop("port", None) or free_port())
    _check_address(port, recipe.server_flag_names())
    command = [*module_command("rollout_server.cli"), recipe.model, "--port", port, *recipe.server_flags()]
    url = f"http://127.0.0.1:{port}"
    learner = [*module_command("learner.cli"), "train", *recipe.learner, "--rollout_url", url]
    learner += ["--output_dir", str(output_dir)]
    plan = Plan(url, output_dir, command, learner, **placed, recipe_environment=recipe.environment)
    if recipe.wants_page:
        page_port = str(free_port(PAGE_PORT))
        plan.learner += ["--page_port", page_port]
        plan.learner_environment[CHOSEN_PORT] = page_port
    return plan


def _check_address(port: str, flags: Sequence[str]) -> None:
    """Raise `invalid_request` where the server would not listen at the URL that the learner is given."""
    for flag in flags:
        name = flag.partition("=")[0].replace("-", "_")
        if name in ADDRESS or name.startswith("ssl_"):
            raise InvalidRequest(
                f"{name}: the server of `learner up` listens on 127.0.0.1 without TLS, at the recipe's `server: port`: "
                "for another address use the two commands, `rollout-server` and `learner train`"
            )
    try:
        check_port(int(port))
    except (OSError, ValueError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"server: port {port} cannot be taken ({why}); give another, or leave it out") from error


def _place_on_cpu(*, split: bool) -> dict[str, Any]:
    if not split:
        return {"places": ("the CPU", "the CPU"), "environment": CPU_ENVIRONMENT}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise InvalidRequest("--split-cores needs two cores")
    halves = {"server_cores": cores[: len(cores) // 2], "learner_cores": cores[len(cores) // 2 :]}
    return {"places": ("half of the cores",) * 2, "environment": CPU_ENVIRONMENT, **halves}


def _place_on_gpus(given: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    gpus = [gpu.device for gpu in visible_gpus()]
    if not gpus:
        raise InvalidRequest("no GPU is visible here (nvidia-smi): to train on the CPU, set use_cpu: true, bf16: false")
    listed = asked if isinstance(asked, list) else gpus[:1] if asked is None else str(asked).split(",")
    own = [str(gpu).strip() for gpu in listed]
    if unknown := [gpu for gpu in own if gpu not in gpus]:
        raise InvalidRequest(f"server: gpus: {', '.join(unknown)} is not visible here; visible are {', '.join(gpus)}")
    if is_true(given, "share_gpu"):
        chosen = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        return {"places": (f"GPU {', '.join(own)}, by turns",) * 2, "environment": chosen}
    left = [gpu for gpu in gpus if gpu not in own]
    if not left:
        raise InvalidRequest(
            f"the server takes GPU {', '.join(own)}, and no other is left for the learner: set share_gpu: true, "
            "so that both take turns on it, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    return {
        "places": (f"GPU {', '.join(own)}", f"GPU {left[0]}"),
        "server_environment": {"CUDA_VISIBLE_DEVICES": ",".join(own)},
        "learner_environment": {"CUDA_VISIBLE_DEVICES": left[0]},
    }


def run(plan: Plan, environment: Mapping[str, str] | None = None) -> int:
    """Start both, show what they say, and end both, the learner first. Returns the exit code; see `main`.

    Args:
        environment: for both, unless set by the user.
    """
    out = plan.output_dir
    out.mkdir(parents=True, exist_ok=True)
    up_lock = OutputLock(out, UP_LOCK)
    base = {**ENVIRONMENT, **plan.environment, **(environment or {}), **os.environ, **module_environment()}
    base |= plan.recipe_environment
    # A device is chosen among those that the user has made visible.
    base |= {name: value for name, value in plan.environment.items() if name == "CUDA_VISIBLE_DEVICES"}
    shown = Output("server", out / SERVER_LOG), Output("learner", out / LEARNER_LOG)
    say(f"the rollout server, on {plan.places[0]}, at {plan.url}; log: {out / SERVER_LOG}")
    say(f"the learner, on {plan.places[1]}; log: {out / LEARNER_LOG}")
    status, reason = None, ""
    try:
        with (
            contextlib.closing(up_lock),
            stop_on_signals() as hurry,
            ProcessGroup(
                plan.server, {**base, **plan.server_environment}, shown[0], cores=plan.server_cores, hurry=hurry
            ) as server,
            ProcessGroup(
                plan.learner,
                {**base, **plan.learner_environment},
                shown[1],
                cores=plan.learner_cores,
                patience_s=LEARNER_PATIENCE_S,
                hurry=hurry,
            ) as learner,
        ):
            try:
                status, reason = _watch(plan, server, learner, shown)
            except Stopped as stopped:
                say(f"{stopped}: ending the learner, then the server; a second signal ends them at once")
                raise
    except Stopped:
        if status is None:  # else the training had ended, and the server was ending
            say(f"stopped; {resumption(out)}")
            return 130
    if reason:  # said last: both have said more while they ended
        say(f"ended; {resumption(out)}")
        say(reason)
    return status


def _watch(plan: Plan, server: ProcessGroup, learner: ProcessGroup, shown: tuple[Output, Output]) -> tuple[int, str]:
    """Wait until one of the two ends; return the exit code and, unless all went well, the reason."""
    started, ready = time.monotonic(), False
    next_look, next_word = started + 1.0, started + _PROGRESS_S
    with RolloutClient(plan.url, read_token(None)) as client:
        while True:
            if (status := learner.process.poll()) == 0:
                return 0, ""
            ended = [
                (process, output)
                for process, output in zip((server, learner), shown, strict=True)
                if process.process.poll() is not None
            ]
            if ended:
                return max(status or 1, 1), "; ".join(_reason(process, output) for process, output in ended)
            now = time.monotonic()
            if not ready and now >= next_look:
                ready, next_look = _is_ready(client), now + 1.0
                if ready:
                    say(f"the rollout server is ready after {now - started:.0f} s")
                elif now >= next_word:
                    say(f"waiting for the rollout server to be ready: {now - started:.0f} s")
                    next_word = now + _PROGRESS_S
            time.sleep(0.1)


def _reason(process: ProcessGroup, output: Output) -> str:
    """Return how a process ended, and what it said last, which is why."""
    status = process.end()  # all that it has said is read then
    return f"the {output.name} ended with {ending(status)}: {output.last or 'it said nothing'}"


def resumption(out: Path) -> str:
    """Return what the same command does then."""
    last = last_checkpoint(out)
    goes_on = f"goes on from {last.name}" if last else "begins anew, since nothing was saved yet"
    return f"the same command {goes_on}"


def _is_ready(client: RolloutClient) -> bool:
    try:
        client.wait_ready(0.0)
    except Unauthenticated:  # it answers: whose token is missing, the learner says
        return True
    except LockstepError:
        return False
    return True
