"""`rollout-server MODEL [our flags] [any vLLM flag]`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from rollout_server import settings as server_settings
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.collections_off import without_collections
from shared.errors import InvalidRequest, LockstepError
from shared.messages import one_line, unknown_flag
from shared.model_files import check_model_exists

if "__mp_main__" in sys.modules:  # a process that vLLM has spawned runs this first, and then imports the same
    with without_collections():
        import vllm.v1.engine.core  # noqa: F401

EXIT_FAILED, EXIT_USAGE = 1, 2
_UNKNOWN = "unrecognized arguments: "

logger = logging.getLogger("lockstep.cli")

#: Connections beyond those of `--max-requests`, and of as many that wait: idle ones, pushes, probes, and requests that
#: are refused.
_SPARE_CONNECTIONS = 1024


def main() -> None:
    """Console entry point."""
    # A CUDA context or OpenMP pool in this process must never be forked into the engine.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Shared memory of an engine that has died: Python would say so after the last line, which is the reason.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    import uvloop

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s rollout-server: %(message)s", "%H:%M:%S"))
    root = logging.getLogger("lockstep")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        check_first(sys.argv[1:])
        with without_collections():
            configured = resolve(sys.argv[1:])
    except Exception as error:  # of vLLM and transformers, of any kind
        _fail(error, EXIT_USAGE)
    if configured[0].check:
        print(f"rollout-server: these flags fit {configured[0].model}")
        return
    try:
        status = uvloop.run(_follow(*configured) if configured[0].node_rank > 0 else _serve(*configured))
    except Exception as error:
        if not isinstance(error, LockstepError):
            logger.exception("the server failed")
        _fail(error, EXIT_FAILED)
    sys.exit(status)


def _fail(error: Exception, status: int) -> NoReturn:
    """Exit with the error as the last line on stderr; with $LOCKSTEP_TRACEBACK, with its traceback."""
    if os.environ.get("LOCKSTEP_TRACEBACK"):
        raise error
    kind = "" if isinstance(error, LockstepError | ValueError) else f"{type(error).__name__}: "
    print(f"rollout-server: {kind}{one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(status)


def check_first(argv: list[str]) -> None:
    """Check port and model as far as they stand on the command line, before vLLM is imported, which takes a while.

    Raises:
        LockstepError: `invalid_request`: the port is taken, or there is no such model.
    """
    from rollout_server.api.connections import listen

    if {"-h", "--help"}.intersection(word.partition("=")[0] for word in argv):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("host", "model", "revision", "hf-config-path"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--node-rank", "--node_rank", "-r", type=int, default=0)
    model = [argv[0]] if argv and not argv[0].startswith("-") else []
    try:
        given, _ = parser.parse_known_args(argv[len(model) :])
    except argparse.ArgumentError:
        return  # the complete parser says what is wrong
    if given.port is not None and given.node_rank == 0:  # others serve no HTTP
        for one in listen(given.host or "127.0.0.1", given.port):
            one.close()
    if model or given.model:
        _check_model(model[0] if model else given.model, given)


def _check_model(model: str, args: Any) -> None:
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() not in ("1", "true"):
        check_model_exists(model, args.revision, config_elsewhere=bool(args.hf_config_path))


def parse(argv: list[str]) -> tuple[Any, server_settings.ServerSettings]:
    """Parse our flags and vLLM's.

    Raises:
        ValueError, LockstepError: flags that cannot work on a rollout server, with what to do instead.
    """
    from rollout_server.api.security import binding
    from rollout_server.api.security.bearer_tokens import configured_tokens
    from rollout_server.engine.proxy import POLICY_MODEL
    from rollout_server.vllm_compat import versions, vision

    versions.vllm_version()
    vision.do_without_torchvision()
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            if message.startswith(_UNKNOWN):
                message = unknown_flag(message.removeprefix(_UNKNOWN).split(), self._option_string_actions)
            raise InvalidRequest(message)

    parser = Parser(prog="rollout-server", description="vLLM that serves a policy while it is trained.")
    server_settings.add_flags(parser)
    parser = versions.make_arg_parser(parser)
    parser.set_defaults(host="127.0.0.1", logprobs_mode="processed_logprobs", enable_lora=True, max_lora_rank=16)
    parser.set_defaults(master_addr="")  # that of this host alone would be of no use to others
    parser.set_defaults(allowed_origins=[])  # every one in some versions of vLLM
    # Without a list vLLM fetches images from everywhere. Its routes take none here; this is a second barrier.
    parser.set_defaults(allowed_media_domains=[vision.NO_MEDIA_DOMAIN])
    # An image that vLLM counts as known to its engine, and whose request is refused then, is missing there.
    parser.set_defaults(mm_processor_cache_gb=0)
    args = parser.parse_args(as_words(argv, parser._option_string_actions))
    settings = server_settings.from_args(args)
    if limit := getattr(args, "max_num_queued_reqs", None):  # who asks for more at once would be told to ask again
        settings = replace(settings, max_sequences=min(settings.max_sequences, limit))
    if args.limit_mm_per_prompt:  # learners would be told another number
        raise ValueError("--limit-mm-per-prompt cannot be used on a rollout server: set --max-images instead")
    if not args.language_model_only:
        args.limit_mm_per_prompt = vision.image_limits(settings.max_images)
    args.model = args.model_tag or args.model
    unusable = {
        "--allowed-media-domains": args.allowed_media_domains != [vision.NO_MEDIA_DOMAIN],
        "--allowed-local-media-path": args.allowed_local_media_path,
        "--lora-modules": args.lora_modules,
        "--worker-extension-cls": args.worker_extension_cls,
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--headless": args.headless and args.nnodes == 1,
        "--uds": args.uds,
        "--enable-ssl-refresh": args.enable_ssl_refresh,
        "--enable-prompt-embeds": args.enable_prompt_embeds,  # embeddings of a request are a pickle
        "--enable-mm-embeds": getattr(args, "enable_mm_embeds", False),
        "--enable-tower-connector-lora": getattr(
            args, "enable_tower_connector_lora", False
        ),  # no learner trains the part that sees
    }
    for flag, given in unusable.items():
        if given:
            raise ValueError(f"{flag} cannot be used on a rollout server: leave it out")
    if not isinstance(args.allowed_origins, list) or not all(isinstance(one, str) for one in args.allowed_origins):
        raise ValueError("--allowed-origins takes a JSON list, as in '[\"http://localhost:3000\"]'")
    for name in args.served_model_name or [args.model]:
        if name == POLICY_MODEL or name.startswith(f"{POLICY_MODEL}:"):
            raise ValueError(f"--served-model-name: {name} means the adapter to clients; give the base another name")
    versions.check_serve_args(args)
    _check_hosts(args, settings)
    if args.node_rank == 0:  # the others serve no HTTP
        binding.check(args, settings, configured_tokens(settings))
    if current_platform.is_cpu() and not shutil.which(os.environ.get("CXX", "g++")):
        # vLLM compiles its sampler even with --enforce-eager, and its engine dies where it cannot.
        logger.warning("no C++ compiler here (g++, or $CXX): the model runs without torch.compile")
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        args.enforce_eager = True
    if settings.deterministic:
        if args.enable_prefix_caching:
            raise ValueError("--deterministic: the contents of the prefix cache differ from time to time; leave it out")
        args.enable_prefix_caching = False
        if current_platform.is_cuda():
            os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    if settings.share_gpu:
        args.enable_sleep_mode = current_platform.is_sleep_mode_available()  # else it only holds requests
    if settings.merges:
        args.enable_lora = False
        args.worker_extension_cls = "rollout_server.worker.merge_extension.MergeWorker"
        return args, settings
    if not args.enable_lora:
        raise ValueError("--no-enable-lora: a rollout server exists to serve a LoRA adapter; leave it out")
    args.max_loras = args.max_cpu_loras = settings.adapter_slots
    args.worker_extension_cls = "rollout_server.worker.extension.AdapterWorker"
    if settings.in_columns:
        if args.fully_sharded_loras:
            raise ValueError("--fully-sharded-loras: each worker would hold a part of A's rank; use --apply adapter")
        _use_columns(args)
    return args, settings


def as_words(argv: list[str], actions: Mapping[str, argparse.Action]) -> list[str]:
    """Return a command line with lists and `--no-FLAG` as the flags take them.

    A recipe knows nothing of their kinds: it writes a list as one word of JSON, and `false` as `--no-FLAG`.

    Args:
        actions: of the parser, by flag.
    """
    words: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        action, items = actions.get(before.replace("_", "-")), _items(word)
        if action is not None and items is not None and (given := _given_list(before, items, action)) is not None:
            words[-1:] = given
        elif not _is_off(word.replace("_", "-"), actions):
            words.append(word)
    return words


def _given_list(flag: str, items: list[str], action: argparse.Action) -> list[str] | None:
    """Return a flag with a list as vLLM takes it; None where that is one word of JSON."""
    if isinstance(action, argparse._AppendAction):
        return [word for item in items for word in (flag, item)]
    if action.nargs in ("+", "*"):
        return [flag, *items] if items else []
    if "--device-ids" in action.option_strings:
        return [flag, ",".join(items)] if items else []
    return None


def _items(word: str) -> list[str] | None:
    """Return the items of a list of JSON; None where the word is none."""
    try:
        items = json.loads(word) if word.startswith("[") else None
    except ValueError:
        return None
    return None if items is None else [item if isinstance(item, str) else json.dumps(item) for item in items]


def _is_off(word: str, actions: Mapping[str, argparse.Action]) -> bool:
    """Return whether a word says `no` to a flag that can only be given or left out."""
    flag = actions.get(f"--{word.removeprefix('--no-')}")
    return word.startswith("--no-") and word not in actions and isinstance(flag, argparse._StoreTrueAction)


def _check_hosts(args: Any, settings: server_settings.ServerSettings) -> None:
    """Refuse flags of an engine over several hosts (`--nnodes`) that cannot work; raises `invalid_request`."""
    from rollout_server.api.security.bearer_tokens import learners_token
    from rollout_server.vllm_compat import topology

    if problem := topology.refusal_of_hosts(args):
        raise InvalidRequest(problem)
    if args.nnodes > 1 and learners_token(settings) is None:
        raise InvalidRequest(
            f"--nnodes {args.nnodes}: hosts of one engine know each other by the token; give all of them the same "
            f"--token-file FILE (`umask 077; openssl rand -hex 32 > FILE`) or ${TOKEN_VARIABLE}"
        )
    args.headless = args.node_rank > 0
    args.master_addr = args.master_addr or "127.0.0.1"


def _use_columns(args: Any) -> None:
    args.worker_extension_cls = "rollout_server.worker.columns_extension.ColumnsWorker"
    # Nothing else tells vLLM's cache of compiled graphs that layers compute in another way.
    args.additional_config = {**(args.additional_config or {}), "lockstep_apply": "columns"}


def resolve(argv: list[str]) -> tuple[Any, Any, server_settings.ServerSettings]:
    """Return flags, vLLM's configuration made of them, and our settings.

    Raises:
        ValueError, LockstepError: a configuration that cannot work on a rollout server.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from rollout_server import lifecycle

    args, settings = parse(argv)
    _check_model(args.model, args)

    def configured() -> Any:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        return engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER, headless=args.headless)

    vllm_config = configured()
    if settings.apply == "auto":
        reason = lifecycle.reason_against_columns(vllm_config, settings)
        settings = replace(settings, apply="adapter" if reason else "columns")
        if settings.in_columns:
            _use_columns(args)
            vllm_config = configured()
        logger.info("--apply %s%s", settings.apply, f": {reason}" if reason else "")
    lifecycle.check_config(vllm_config, settings)
    return args, vllm_config, settings


async def _follow(args: Any, vllm_config: Any, settings: server_settings.ServerSettings) -> int:
    """Run the workers of a host that is not the head; return the process's exit status."""
    from rollout_server import follower

    return await follower.follow(vllm_config, settings, _token_of_hosts(vllm_config, settings) or "")


def _token_of_hosts(vllm_config: Any, settings: server_settings.ServerSettings) -> str | None:
    """Return the token that all hosts of the engine have, if it is on several; out of the environment from now on.

    vLLM gives this process's environment to its workers, on a Ray cluster over the network.
    """
    from rollout_server.api.security.bearer_tokens import learners_token
    from rollout_server.vllm_compat import topology

    token = learners_token(settings) if vllm_config and topology.over_hosts(vllm_config.parallel_config) else None
    os.environ.pop(TOKEN_VARIABLE, None)
    return token


async def _serve(args: Any, vllm_config: Any, settings: server_settings.ServerSettings) -> int:
    """Run until SIGTERM, SIGINT or the engine's death; return the process's exit status."""
    from rollout_server import lifecycle
    from rollout_server.api.connections import Connections, connections_that_fit, listen
    from rollout_server.api.middleware.auth import AuthMiddleware
    from rollout_server.api.middleware.readiness import ReadinessMiddleware
    from rollout_server.api.security import binding
    from rollout_server.api.security.bearer_tokens import configured_tokens
    from rollout_server.api.server import HttpServer
    from rollout_server.engine.capacity import Capacity
    from rollout_server.sessions.records import Sessions

    readiness, capacity, sessions = ReadinessMiddleware(), Capacity(settings), Sessions(settings)

    wanted, fitting = 2 * settings.max_requests + _SPARE_CONNECTIONS, connections_that_fit()
    if fitting < wanted:
        logger.warning("`ulimit -n` leaves room for %d connections; --max-requests needs %d", fitting, wanted)

    access = binding.local_access(args, settings)

    def leave() -> None:
        if readiness.is_open:
            capacity.drain()
        else:
            server.stop()

    server = HttpServer(
        AuthMiddleware(readiness, configured_tokens(settings), access, args.allowed_origins, sessions),
        leave,
        Connections(min(wanted, fitting)),
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        timeout_graceful_shutdown=5,  # for responses that are still being sent when nothing runs any more
        **binding.tls_options(args),
    )
    token = _token_of_hosts(vllm_config, settings)
    # Before the engine takes memory that may be another server's.
    http = asyncio.ensure_future(server.serve(listen(args.host, args.port)))
    starting = asyncio.ensure_future(lifecycle.start(args, vllm_config, settings, readiness, capacity, sessions, token))
    status = 0
    try:
        await asyncio.wait((http, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not http.done():
            watching = asyncio.ensure_future(lifecycle.watch(starting.result()))
            leaving = asyncio.ensure_future(lifecycle.drained(starting.result()))
            await asyncio.wait((http, watching, leaving), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
                status = 1
            if leaving.done():
                leaving.result()
            watching.cancel()
            leaving.cancel()
    finally:
        server.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await http
        starting.cancel()
        readiness.close()
    return status


if __name__ == "__main__":
    main()
