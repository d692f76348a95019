"""This server's own flags, beside vLLM's."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any


def _flag(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class ServerSettings:
    """Each field is a flag of `rollout-server` (`--slots-per-run` and so on)."""

    slots_per_run: int = _flag(
        2,
        "adapter slots of each run, at least 2: one serves while another is filled, and a third lets running "
        "requests last longer than the time between two pushes",
    )
    max_runs: int = _flag(1, "training runs served at the same time, each with slots of its own")
    apply: str = _flag(
        "auto",
        "how an adapter is served: `adapter` beside the base, by vLLM's LoRA kernels; `columns` beside it, in the same "
        "matrix product, so that no small update is lost in rounding; `merge`: added to the base's weights, which "
        "decodes as fast as the base but serves one run only, and no base while it lives; or `auto`: `columns` for an "
        "unquantized base in 16 bits, where rounding loses small updates, else `adapter`",
        ("auto", "adapter", "columns", "merge"),
    )
    keep_base: str = _flag(
        "auto",
        "where `--apply merge` keeps the base's weights: on the GPU, in host memory, or on the GPU if they fit",
        ("auto", "device", "host"),
    )
    share_gpu: bool = _flag(
        False,
        "the GPU is also a learner's: the server sleeps while that one trains (learner --share_gpu). One run, one GPU; "
        "--gpu-memory-utilization must leave room for the learner's model",
    )
    deterministic: bool = _flag(
        False,
        "the same seeded request gives the same tokens and logprobs: one /v1/generate or /v1/score at a time, no "
        "prefix cache, and on GPUs vLLM's batch-invariant kernels; slower. Requests of vLLM's own routes disturb it",
    )
    push_timeout: float = _flag(120.0, "seconds after which a push that has not been installed fails")
    collective_timeout: float = _flag(
        30.0, "seconds after which a broadcast, or the meeting of a collective group, fails; pushes then come over HTTP"
    )
    drain_seconds: float = _flag(60.0, "seconds that running requests get to finish after SIGTERM or POST /v1/drain")
    max_adapter_mib: int = _flag(8192, "largest adapter accepted, in MiB")
    max_body_mib: int = _flag(32, "largest body of any other request, in MiB; beyond it 413")
    max_bodies_mib: int = _flag(
        4096, "memory for the bodies of all requests under way together, as sent and as parsed, in MiB; beyond it 429"
    )
    max_requests: int = _flag(2048, "requests under way at once; beyond it 429")
    max_sequences: int = _flag(
        32768,
        "sequences (prompts times n) running or waiting at once, over all routes and runs; beyond it 429. A "
        "step of one learner asks for some thousand",
    )
    max_prompts: int = _flag(16384, "prompts, or sequences to score, in one request; beyond it 413")
    max_n: int = _flag(1024, "completions of one prompt in one request; beyond it 413")
    max_request_tokens: int = _flag(
        2**27, "tokens in one request: its prompts, and max_tokens of each completion; beyond it 413"
    )
    max_images: int = _flag(8, "images of one prompt; beyond it 413")
    max_image_mib: int = _flag(8, "largest file of an image, in MiB; beyond it 413")
    max_image_pixels: int = _flag(2**24, "pixels of one image, checked before it is decoded; beyond it 413")
    max_sessions: int = _flag(4096, "sessions of agents open at once; beyond it 429")
    max_session_tokens: int = _flag(
        2**25,
        "tokens that all sessions may hold together, prompted and sampled, of 4 to 20 bytes each, with what calls "
        "under way may add (max_tokens); beyond it 429",
    )
    engine_stall_seconds: float = _flag(
        300.0,
        "seconds after which an engine that has requests and gives no token for any of them counts as dead, and "
        "the server stops; must be more than the longest prompt takes. 0: never",
    )
    allow_policy_altering: bool = _flag(
        False, "serve although speculative decoding or a quantized KV cache makes logprobs differ from the policy's"
    )
    token_file: str = _flag(
        "",
        "file with the bearer token of learners, which may do everything; several lines are several tokens. "
        "Without it $LOCKSTEP_TOKEN counts. Needed wherever --host is not this machine alone",
    )
    generate_token_file: str = _flag("", "file with tokens that may generate and score, but change nothing")
    metrics_token_file: str = _flag("", "file with tokens that may read /metrics and nothing else")
    allow_unauthenticated: bool = _flag(
        False, "let everyone who reaches this server use it, and replace the weights it serves"
    )
    allowed_hosts: str = _flag(
        "",
        "names with a dot by which programs call a server without tokens, separated by commas "
        "(`rollout.prod.svc,gpu-1.corp.example`); addresses and names without a dot need none",
    )

    @property
    def merges(self) -> bool:
        """Whether adapters go into the live weights."""
        return self.apply == "merge"

    @property
    def in_columns(self) -> bool:
        """Whether adapter slots are columns of the weights."""
        return self.apply == "columns"

    @property
    def adapter_slots(self) -> int:
        """Slots of all runs together: vLLM's `max_loras`."""
        return self.slots_per_run * self.max_runs


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of `ServerSettings`, and `--check`."""
    group = parser.add_argument_group("lockstep", "Flags of the rollout server itself; all others are vLLM's.")
    for setting in fields(ServerSettings):
        options: dict[str, Any] = {"default": setting.default, "help": setting.metadata["help"]}
        if isinstance(setting.default, bool):
            options["action"] = "store_true"
        else:
            options |= {"type": type(setting.default), "choices": setting.metadata["choices"]}
        # vLLM's parser adds the default to the help.
        group.add_argument("--" + setting.name.replace("_", "-"), **options)
    group.add_argument("--check", action="store_true", help="say whether these flags fit the model, and end")


_MAY_BE_ZERO = ("drain_seconds", "engine_stall_seconds")


def from_args(args: argparse.Namespace) -> ServerSettings:
    """Read the settings out of parsed flags.

    Raises:
        ValueError: a value that cannot work.
    """
    settings = ServerSettings(**{setting.name: getattr(args, setting.name) for setting in fields(ServerSettings)})
    for name, value in vars(settings).items():
        if isinstance(value, bool | str) or name == "slots_per_run":
            continue
        if not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number")
        if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            least = "not be negative" if name in _MAY_BE_ZERO else "be more than 0"
            raise ValueError(f"--{name.replace('_', '-')} must {least}")
    if settings.slots_per_run < 2 and not settings.merges:
        raise ValueError(
            "--slots-per-run must be 2 or more: a push fills and checks one slot while another serves, so that one "
            "that fails changes nothing"
        )
    if settings.merges and settings.max_runs > 1:
        raise ValueError("--apply merge serves one run, whose adapter is in the weights: leave out --max-runs")
    if settings.share_gpu and settings.max_runs > 1:
        raise ValueError("--share-gpu: the server would sleep under the other runs' learners; leave out --max-runs")
    if settings.share_gpu and settings.keep_base == "device":
        raise ValueError("--share-gpu: what is kept on the GPU does not sleep; leave out --keep-base")
    return replace(settings, keep_base="host") if settings.share_gpu else settings
