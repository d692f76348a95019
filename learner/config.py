"""Lockstep's own options of `learner train`; TRL's GRPOConfig and ModelConfig carry all others."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from learner.servers.discovery import ServerDiscovery
from shared.errors import InvalidRequest
from shared.weights import RUN_ID_PATTERN


class _Repeatable(argparse.Action):
    """Collect the values of every occurrence of a flag; the first occurrence replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def _option(default: Any, text: str, **kwargs: Any) -> Any:
    """Declare a field; `kwargs` go to `ArgumentParser.add_argument`."""
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class LearnerConfig:
    """Where rollouts come from, what is trained on, and how the sync is proven.

    Parsed by TRL's `TrlParser` next to GRPOConfig and ModelConfig, so every field is a flag and a YAML key.
    Dicts are given as JSON on the command line.
    """

    rollout_url: list[str] | None = _option(
        None,
        "URLs of the rollout servers, e.g. http://127.0.0.1:8000 (required). dns+http://NAME:PORT stands for all "
        "addresses of a name, file:PATH for a file with one URL a line; servers may come and go there while it runs.",
        action=_Repeatable,
    )
    task: str | None = _option(
        None,
        "What to train on (required): reasoning_gym:NAME, a JSONL file, a dataset on the hub, or module:object.",
    )
    task_args: dict | str | None = _option(None, "Parameters of the task, as JSON.")
    reward_funcs: list[str] | None = _option(
        None, "Reward functions by import path, module:function. Default: those the task brings along."
    )
    tools: list[str] | None = _option(
        None, "Functions that the model may call, by import path, module:function; TRL's tools."
    )
    environment: str | None = _option(
        None,
        "Class whose methods the model may call, one object a completion, by import path, module:Class; TRL's "
        "environment_factory. Its get_reward, if it has one, is a reward.",
    )
    eval_dataset: str | None = _option(None, "Another task or file to evaluate on. Default: held-out rows of --task.")
    eval_size: int = _option(128, "Questions held out for evaluation; training never sees them.")
    train_size: int | None = _option(None, "Questions to train on. Default: as many as the task has or makes.")
    prompt_column: str = _option("prompt", "Column that holds the prompt, for files and datasets.")
    run_id: str | None = _option(
        None,
        "Name of this run on the server. Default: that of a run in output_dir, else its name and a random suffix.",
    )
    init_adapter: str | None = _option(
        None, "Start from this PEFT adapter directory instead of a fresh adapter; its LoRA settings are used."
    )
    lora_kwargs: dict | str | None = _option(
        None,
        "Fields of peft.LoraConfig that have no flag, as JSON: rank_pattern, alpha_pattern, exclude_modules ...",
    )
    save_merged: bool = _option(
        False,
        "At the end, also write the base model with the adapter in its weights, in bfloat16, to output_dir/merged (see "
        "learner export --merge).",
    )
    proof_every: int = _option(
        10,
        "Compare served and own logprobs every so many steps (also at steps 0, 1, 2 and the last). 0: only those.",
    )
    proof_tolerance: float | None = _option(
        None,
        "Largest allowed |served - own| logprob in nats. Default: derived from the dtypes, see learner/sync/proof.py.",
    )
    proof_canary: bool = _option(
        True,
        "At the start, push a throw-away adapter with a large effect, to prove that adapters reach the logits.",
    )
    ready_timeout_s: float = _option(
        600.0, "How long to wait for a rollout server to be ready, at the start and whenever none is up, in seconds."
    )
    push_timeout_s: float = _option(120.0, "Deadline of one adapter push, in seconds.")
    transport: Literal["auto", "http", "collective"] = _option(
        "auto",
        "How adapters travel: auto broadcasts (NCCL) between different GPUs and uses HTTP elsewhere; http; collective "
        "also between CPUs (gloo).",
    )
    in_flight: Literal["drain", "keep", "carried"] = _option(
        "drain",
        "What becomes of completions that are under way when a push arrives: drain finishes them on their version; "
        "keep goes on with the new one and recomputes their KV; carried goes on with the new one and their old KV.",
    )
    max_staleness: int = _option(
        0,
        "Generation batches that rollouts may run ahead of training: 0 alternates strictly; with S > 0 the next S "
        "batches are requested while the learner trains, and nothing older is ever trained on.",
    )
    share_gpu: bool = _option(
        False,
        "Train on the rollout server's own GPU, by turns: it sleeps while the learner computes. Needs rollout-server "
        "--share-gpu, one server and one learner process.",
    )
    deterministic: bool = _option(
        False,
        "Seeds derived from the place of each prompt, and deterministic kernels: a killed and resumed training makes "
        "the same updates as one never killed. Needs rollout-server --deterministic.",
    )
    reward_workers: int = _option(
        2,
        "Processes of each rank that compute rewards, one group at a time, as soon as its completions arrive. 0: TRL "
        "calls reward functions itself, for the whole batch, after the last rollout and in the learner's process: for "
        "functions that look across groups, or keep something from one call to the next.",
    )
    reward_timeout_s: float = _option(
        60.0,
        "Limit of a reward function per sample, in seconds. What takes longer is killed; the sample is left out of the "
        "training.",
    )
    drop_degenerate_groups: bool = _option(
        False,
        "Replace groups whose rewards do not vary, which teach nothing, by other prompts of the training data before "
        "the training (DAPO's dynamic sampling). Needs reward_workers.",
    )
    degenerate_rounds: int = _option(
        4, "How often a group is replaced at most; one that does not vary even then is trained on as it is."
    )
    generate_timeout_s: float = _option(1800.0, "Deadline of one generate request, in seconds.")
    metrics_port: int | None = _option(None, "Serve Prometheus metrics of the learner on this port. Default: nowhere.")
    metrics_host: str = _option(
        "127.0.0.1", "Address that metrics_port listens on. They are numbers and names, and ask for no token."
    )
    run_page: bool = _option(
        True, "Write output_dir/run.html while training: charts, settings, and sample completions to read."
    )
    token_file: str | None = _option(None, "File with the bearer token for the server. Default: $LOCKSTEP_TOKEN.")
    ca_file: str | None = _option(
        None, "Certificate (PEM) of the CA that the server's certificate is from. Default: the well-known ones."
    )
    allow_base_mismatch: bool = _option(
        False,
        "Train although the server's base model cannot be shown to be the learner's (dummy weights, say).",
    )
    allow_policy_altering: bool = _option(
        False,
        "Train although the server speculates or quantizes its KV cache, so its logprobs are not the policy's.",
    )
    takeover: bool = _option(False, "Take the run over from another learner, whose pushes are refused from then on.")

    def __post_init__(self) -> None:
        if isinstance(self.rollout_url, str):
            self.rollout_url = [self.rollout_url]
        for name in ("task_args", "lora_kwargs"):
            setattr(self, name, _json_object(getattr(self, name), name))
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port {self.metrics_port}: a port is between 1 and 65535; 0 serves no metrics")
        if self.max_staleness < 0:
            raise ValueError("max_staleness must not be negative")
        if self.degenerate_rounds < 1:
            raise ValueError("degenerate_rounds must be at least 1; leave drop_degenerate_groups out to replace none")
        if self.drop_degenerate_groups and not self.reward_workers:
            raise ValueError(
                "drop_degenerate_groups: rewards are needed before TRL computes them; set reward_workers to 1 or more"
            )
        if self.reward_workers < 0 or self.reward_timeout_s <= 0:
            raise ValueError("reward_workers must not be negative, reward_timeout_s must be more than 0")
        if self.share_gpu and self.max_staleness:
            raise ValueError(
                "share_gpu: rollouts ahead of the training need a GPU of their own; leave max_staleness at 0"
            )
        if self.deterministic and self.max_staleness:
            raise ValueError(
                "deterministic: how far a push has come when a rollout begins differs from time to time; "
                "leave max_staleness at 0"
            )
        if self.deterministic and self.in_flight != "drain":
            raise ValueError(
                "deterministic: when a push overtakes a completion differs from time to time; leave in_flight at drain"
            )
        if self.run_id is not None and not re.match(RUN_ID_PATTERN, self.run_id):
            raise ValueError(f"run_id {self.run_id!r}: letters, digits, dot, dash and underscore, at most 64")

    @property
    def task_options(self) -> dict[str, Any]:
        """`task_args` as a dict."""
        return _json_object(self.task_args, "task_args")

    @property
    def lora_options(self) -> dict[str, Any]:
        """`lora_kwargs` as a dict."""
        return _json_object(self.lora_kwargs, "lora_kwargs")

    def require_urls(self) -> list[str]:
        """Where the rollout servers are.

        Raises:
            LockstepError: `invalid_request` if that is missing, or says several where there can be only one.
        """
        if not self.rollout_url:
            raise InvalidRequest("give --rollout-url, e.g. http://127.0.0.1:8000")
        several = len(self.rollout_url) > 1 or ServerDiscovery(self.rollout_url).may_change
        for option, why in (
            ("deterministic", "which server completes a prompt depends on their speed"),
            ("share_gpu", "the learner is on the GPU of one server"),
        ):
            if several and getattr(self, option):
                raise InvalidRequest(f"{option}: {why}; give one --rollout-url")
        return self.rollout_url

    def require_task(self) -> str:
        """The task's specification.

        Raises:
            LockstepError: `invalid_request` if it is missing.
        """
        if not self.task:
            raise InvalidRequest("give --task, e.g. reasoning_gym:chain_sum or FILE.jsonl")
        return self.task


def _json_object(value: dict | str | None, name: str) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value
