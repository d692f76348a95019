"""`learner up --cluster`: servers and learner of one recipe on a Ray cluster, until the training ends."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from learner.cluster.connection import connect
from learner.cluster.hosted import Command, place
from learner.cluster.job import ClusterJob, RunningJob
from learner.cluster.learner_nodes import FIRST_HOST, FIRST_PORT, LEARNER
from learner.cluster.resources import (
    Needs,
    Node,
    Resources,
    check_room,
    fewest_nodes,
    fits,
    has_room,
    home_of,
    nodes,
)
from learner.commands.flags import is_true
from learner.commands.up import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    LEARNER_LOG,
    LEARNER_PATIENCE_S,
    PAGE_PORT,
    resumption,
)
from learner.commands.up_output import Output, say
from learner.commands.up_recipe import Recipe
from learner.monitors.page_server import CHOSEN_PORT
from learner.run_dir.checkpoint import last_checkpoint
from learner.run_dir.lock import UP_LOCK, OutputLock, wait_unused
from learner.utils.ports import free_port
from learner.utils.processes import Stopped, stop_on_signals
from shared.bearer_tokens import TOKEN_VARIABLE, parse_tokens
from shared.errors import InvalidRequest

#: What the nodes decide, or what a file is sent for.
_ADDRESS = ("host", "port", "uds", "gpus")
_FILES = ("generate_token_file", "metrics_token_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
_TENSOR_PARALLEL, _DATA_PARALLEL = ("tensor_parallel_size", "tp"), ("data_parallel_size", "dp")
#: Of machines that are no nodes of the cluster.
_FROM_ELSEWHERE = "ray://"


def run(recipe: Recipe) -> int:
    """Run a recipe on a cluster. Returns the exit code: the learner's, 1 if no server can run, 130 if stopped.

    Raises:
        InvalidRequest: no Ray, no cluster, or too small a one; an option that cannot work there.
    """
    _check(recipe)
    out, tokens = recipe.output_dir, _tokens(recipe)
    ray = connect(recipe.options.cluster)
    try:
        found, servers = nodes(ray), recipe.options.servers or (1, 1)
        needs, learner_needs, name = _server_needs(recipe, found), _learner_needs(recipe, found), _name(out)
        server = _server(recipe, tokens, needs)
        check_room(found, needs, servers[0], learner_needs)
        from_elsewhere = recipe.options.cluster.startswith(_FROM_ELSEWHERE)
        home = None if from_elsewhere else home_of(ray, found, learner_needs.bundle)
        if home and not has_room(found, needs, servers[0], learner_needs, home):
            home = None  # the servers need it
        job = ClusterJob(
            name=name,
            server=server,
            servers=servers,
            server_needs=needs,
            learner=_learner(recipe, tokens, name, home, learner_needs.bundles),
            learner_needs=learner_needs,
            home=home,
            can_resume=_has_come_further(out),
        )
        return _follow(ray, job, out)
    finally:
        ray.shutdown()


def _has_come_further(out: Path) -> Callable[[], bool]:
    """Return what says whether there is a newer checkpoint than when it was last asked, or than now.

    A learner that is out of reach may still be saving its step: until it has ended, another would be refused.
    """
    seen = last_checkpoint(out)

    def further() -> bool:
        nonlocal seen
        if not wait_unused(out, 0.0):
            say(f"the learner that is gone is still saving: waiting for its end, {LEARNER_PATIENCE_S:.0f} s at most")
            wait_unused(out, LEARNER_PATIENCE_S)
        before, seen = seen, last_checkpoint(out)
        return seen is not None and seen != before

    return further


def _follow(ray: Any, job: ClusterJob, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    up_lock = OutputLock(out, UP_LOCK)
    shown: dict[str, Output] = {}

    def show(name: str, line: str) -> None:
        if name not in shown:
            shown[name] = Output(name, out / (LEARNER_LOG if name == LEARNER else f"{name}.log"))
        shown[name](line)

    least, most = job.servers
    count = f"{least}" if least == most else f"{least} to {most}"
    say(f"{count} x rollout server on {job.server_needs}, listed as ray:{job.name}; logs: {out}/server-N.log")
    where, log = [f"on {job.home.address}"] if job.home else [], f"{out / LEARNER_LOG}"
    if job.learner_needs.bundles > 1:
        log += f", {out}/{LEARNER}-N.log"
    if not job.home or job.learner_needs.bundles > 1:
        where.append(f"on any {'other ' if job.home else ''}node: each must see {out}")
    say(f"the learner on {job.learner_needs}, {' and '.join(where)}; log: {log}")
    status, reason = None, ""
    running = RunningJob(ray, job, show, say)
    try:
        with contextlib.closing(up_lock), stop_on_signals() as hurry, _ended(running, hurry):
            try:
                status, reason = running.run()
            except Stopped as stopped:
                say(f"{stopped}: ending the learner, then the servers; a second signal ends them at once")
                raise
    except Stopped:
        if status is None:
            say(f"stopped; {resumption(out)}")
            return 130
    if reason:
        say(f"ended; {resumption(out)}")
        say(reason)
    return status or 0


@contextlib.contextmanager
def _ended(running: RunningJob, hurry: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        running.end(hurry)


def _check(recipe: Recipe) -> None:
    """Refuse what cannot work on a cluster: `invalid_request`."""
    own = [name.partition("=")[0].replace("-", "_") for name in recipe.server_flag_names()]
    for name in _ADDRESS:
        if name in own:
            raise InvalidRequest(f"server: {name}: on a cluster each server has its node's; leave it out")
    for name in (*_FILES, "token_file"):
        if name in own and name not in recipe.server:
            raise InvalidRequest(
                f"--server-flags: write {name} below `server:` in the recipe, so that its file is sent"
            )
    for name, why in (
        ("share_gpu", "the learner has its own GPUs there"),
        ("deterministic", "which server completes a prompt depends on their speed"),
    ):
        if is_true(recipe.given, name):
            raise InvalidRequest(f"{name}: {why}; leave it out, or --cluster")
    if recipe.options.split_cores:
        raise InvalidRequest("--split-cores is for one machine; on a cluster give --cpus-per-server and --learner-cpus")
    if recipe.options.cluster.startswith(_FROM_ELSEWHERE) and not recipe.output_dir.is_absolute():
        raise InvalidRequest(
            f"output_dir {recipe.output_dir}: from a machine that is no node ({_FROM_ELSEWHERE}) give an absolute "
            "path, on a file system that the nodes see"
        )


def _server_needs(recipe: Recipe, found: Sequence[Node]) -> Needs:
    """Return the resources of a server: on one node, or of each worker where Ray places them on several.

    Raises:
        InvalidRequest: its workers would use other GPUs than it is given.
    """
    options, executor, gpus = recipe.options, recipe.server_flag("distributed_executor_backend"), _gpus(recipe)
    cpus, workers, engines = options.cpus_per_server or 1, _workers(recipe), recipe.server_count(*_DATA_PARALLEL) or 1
    given = options.gpus_per_server or gpus * workers * engines
    is_spread = executor == "ray"
    if not executor and gpus and workers > 1 and engines == 1 and not fits(found, {"GPU": given}):
        say(f"no node has {given} GPUs: the workers of each server are placed on several (Ray)")
        is_spread = True
    if not is_spread:
        return Needs(_asked(cpus, given))
    if options.gpus_per_server not in (None, workers):
        raise InvalidRequest(
            f"server: tensor_parallel_size {workers} and --gpus-per-server {options.gpus_per_server}: on several nodes "
            "each worker has a GPU; give one of them"
        )
    # Without GPUs vLLM takes a CPU for each worker.
    return Needs(_asked(cpus / workers if gpus else 1, gpus), workers)


def _workers(recipe: Recipe) -> int:
    """Return how many workers an engine of a server has."""
    if (own := recipe.server_count(*_TENSOR_PARALLEL)) is not None:
        return own
    return 1 if recipe.server_flag(*_DATA_PARALLEL) else recipe.options.gpus_per_server or 1


def _learner_needs(recipe: Recipe, found: Sequence[Node]) -> Needs:
    """Return the resources of the learner on each of its nodes; raises `invalid_request` where they are not equal."""
    options, gpus = recipe.options, recipe.options.learner_gpus or _gpus(recipe)
    count = options.learner_nodes or 1
    if not options.learner_nodes and gpus > 1 and (fewest := fewest_nodes(found, gpus) or 1) > 1:
        say(f"no node has {gpus} GPUs: the learner's ranks are placed on {fewest}")
        count = fewest
    if gpus % count:
        raise InvalidRequest(
            f"--learner-gpus {gpus} on --learner-nodes {count}: each node has as many ranks as the others; give a "
            f"multiple of {count}"
        )
    return Needs(_asked((options.learner_cpus or max(gpus, count)) / count, gpus // count), count if count > 1 else 0)


def _gpus(recipe: Recipe) -> int:
    """Return how many GPUs a process of vLLM or of the learner has."""
    return 0 if is_true(recipe.given, "use_cpu") else 1


def _asked(cpus: float, gpus: float) -> Resources:
    return {name: value for name, value in {"CPU": cpus, "GPU": gpus}.items() if value}


def _server(recipe: Recipe, tokens: bytes, needs: Needs) -> Command:
    flags = ["--host", place("host"), "--port", place("port"), "--token-file", place("token")]
    sent = {"token": tokens}
    recipe.server.pop("token_file", None)
    for name in _FILES:
        if path := recipe.server.pop(name, None):
            sent[name] = _read(str(path), f"server: {name}")
            flags += [f"--{name.replace('_', '-')}", place(name)]
    parallel: dict[str, Any] = {}
    if (workers := _workers(recipe)) > 1 and not recipe.server_flag(*_TENSOR_PARALLEL):
        parallel["tensor_parallel_size"] = workers
    if needs.parts and not recipe.server_flag("distributed_executor_backend"):
        parallel["distributed_executor_backend"] = "ray"
    scheme = "https" if "ssl_certfile" in sent else "http"
    return Command(
        module="rollout_server.cli",
        arguments=(recipe.model, *flags, *recipe.server_flags(**parallel)),
        secrets=sent,
        url=f"{scheme}://{place('host')}:{place('port')}",
        again=True,
        **_common(recipe),
    )


def _learner(recipe: Recipe, tokens: bytes, name: str, home: Node | None, count: int) -> list[Command]:
    """Return the learner's command for each of `count` nodes."""
    sent = {"token": tokens}
    train = ["learner.cli", "train", *recipe.learner, "--token_file", place("token")]
    if path := recipe.given.get("ca_file"):
        sent["ca"] = _read(str(path), "ca_file")
        train += ["--ca_file", place("ca")]
    train += ["--rollout_url", f"ray:{name}", "--output_dir", os.path.abspath(recipe.output_dir)]
    common = _common(recipe)
    if home and recipe.wants_page:
        train += ["--page_port", page_port := str(free_port(PAGE_PORT))]
        common["environment"] = {**recipe.environment, CHOSEN_PORT: page_port}
    ranks = max((recipe.options.learner_gpus or 1) // count, 1)
    launched = ["torch.distributed.run", "--nproc-per-node", str(ranks)]
    meeting = ["--master-addr", FIRST_HOST, "--master-port", FIRST_PORT]
    commands = []
    for number in range(count):
        place_of = ["--nnodes", str(count), "--node-rank", str(number), *meeting] if count > 1 else ["--standalone"]
        words = [*launched, *place_of, "-m", *train] if count * ranks > 1 else train
        module, *arguments = words
        commands.append(Command(module, tuple(arguments), sent, patience_s=LEARNER_PATIENCE_S, **common))
    return commands


def _common(recipe: Recipe) -> dict[str, Any]:
    on_cpu = CPU_ENVIRONMENT if is_true(recipe.given, "use_cpu") else {}
    return {
        "defaults": {**ENVIRONMENT, **on_cpu},
        "environment": recipe.environment,
        "directory": os.getcwd(),
    }


def _tokens(recipe: Recipe) -> bytes:
    """Return the servers' tokens, of which the learner sends the first: the user's, or one for this job alone."""
    if path := recipe.server.get("token_file") or recipe.given.get("token_file"):
        tokens, source = _read(str(path), "token_file"), f"token_file {path}"
    else:
        tokens, source = os.environ.get(TOKEN_VARIABLE, "").encode() or secrets.token_hex(32).encode(), TOKEN_VARIABLE
    parse_tokens(tokens.decode(errors="replace"), source)
    return tokens


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{name} {path} cannot be read: {error.strerror}") from error


def _name(out: Path) -> str:
    """Return a name for the servers of this job, which no other has."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip("-._")[:48]
    return f"{stem or 'run'}-{secrets.token_hex(3)}"
