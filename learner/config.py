"""Options of `learner train` beside those of TRL's GRPOConfig and ModelConfig."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from learner.utils.wording import option
from shared.errors import InvalidRequest
from shared.sessions import MOST_CALLS, MOST_TOKENS
from shared.weights import MAX_KEEP_SECONDS, RUN_ID_PATTERN


def slots_needed(
    max_staleness: int, *, steps_per_generation: int, num_iterations: int, gradient_accumulation_steps: int
) -> int:
    """Return the adapter slots with which no push waits: a request ahead holds one during the pushes of S batches."""
    micro_steps = max_staleness * steps_per_generation * num_iterations
    return -(-micro_steps // gradient_accumulation_steps) + 1


class _Repeatable(argparse.Action):
    """Collect the values of every occurrence of a flag; the first occurrence replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def _option(default: Any, text: str, **kwargs: Any) -> Any:
    """Declare a field; `kwargs` go to `ArgumentParser.add_argument`."""
    return field(default=default, metadata={"help": text, **kwargs})


_NOT_NEGATIVE = 0, "not be negative"
_POSITIVE = sys.float_info.min, "be more than 0"
#: Numeric options: their least value, and what to say of a smaller or infinite one.
_BOUNDS: dict[str, tuple[float, str]] = {
    "eval_size": _NOT_NEGATIVE,
    "train_size": (1, "be at least 1"),
    "proof_every": _NOT_NEGATIVE,
    "proof_tolerance": _NOT_NEGATIVE,
    "ready_timeout_s": _NOT_NEGATIVE,
    "push_timeout_s": _POSITIVE,
    "generate_timeout_s": _POSITIVE,
    "max_staleness": _NOT_NEGATIVE,
    "max_tokens_per_pass": (1, "be at least 1"),
    "reward_workers": _NOT_NEGATIVE,
    "reward_timeout_s": _POSITIVE,
    "keep_run": _NOT_NEGATIVE,
    "agent_concurrency": (1, "be at least 1"),
    "agent_timeout_s": _POSITIVE,
    "agent_max_calls": (1, "be at least 1"),
    "agent_max_tokens": (1, "be at least 1"),
    "degenerate_rounds": (1, "be at least 1; leave drop_degenerate_groups out to replace none"),
}
#: Options that only `learner train` reads: where a script attaches, its trainer has all of this.
_OF_TRAIN = (
    *("task", "task_args", "eval_dataset", "eval_size", "train_size", "prompt_column"),
    *("reward_funcs", "tools", "environment", "init_adapter", "lora_kwargs", "save_merged"),
)


@dataclass(kw_only=True)
class LearnerConfig:
    """Options of `learner train` and `attach`: rollout servers, task, weight sync, rewards, monitoring.

    `attach` refuses those that say what to train, and on what: its trainer has that.

    TRL's `TrlParser` parses them next to GRPOConfig and ModelConfig, so every field is a flag and a YAML key.
    Dicts are given as JSON on the command line; after construction they are dicts.

    Raises:
        ValueError: for values out of range or options that exclude each other.
    """

    rollout_url: list[str] | None = _option(
        None,
        "URLs of the rollout servers, e.g. http://127.0.0.1:8000 (required). dns+http://NAME:PORT stands for every "
        "address of NAME, file:PATH for a file with one URL per line, ray:NAME for those of `learner up --cluster`; "
        "these may come and go during training.",
        action=_Repeatable,
    )
    task: str | None = _option(
        None, "Task to train on (required): reasoning_gym:NAME, a JSONL file, a Hub dataset, or module:object."
    )
    task_args: dict | str | None = _option(None, "Arguments of the task, as JSON.")
    reward_funcs: list[str] | None = _option(
        None, "Reward functions by import path, module:function. Default: the task's own."
    )
    tools: list[str] | None = _option(None, "Tools the model may call, by import path, module:function (TRL's tools).")
    environment: str | None = _option(
        None,
        "Environment class by import path, module:Class; one instance per completion (TRL's environment_factory). Its "
        "methods are tools; its get_reward, if defined, is a reward function.",
    )
    agent: str | None = _option(
        None,
        "Agent by import path, module:function: called as agent(session, row) for each completion, plain or async. It "
        "sends its requests to session.base_url (OpenAI's and Anthropic's routes), and returns a reward, or None where "
        "the reward functions score the conversation. See docs/agents.md.",
    )
    agent_command: str | None = _option(
        None,
        "Agent that is a program: a shell command, run for each completion with OPENAI_BASE_URL, ANTHROPIC_BASE_URL "
        "and their keys set, and the row as JSON in $LOCKSTEP_ROW_FILE. It may write its reward to "
        "$LOCKSTEP_REWARD_FILE.",
    )
    agent_concurrency: int = _option(32, "Episodes of the agent that run at a time, on each rank.")
    agent_backend: Literal["process", "ray"] = _option(
        "process",
        "Where episodes of the agent run: process: in the learner, or in processes beside it; ray: on the Ray cluster "
        "of $RAY_ADDRESS, or the one that this machine is a node of, for agents that need more cores or sandboxes than "
        "it has.",
    )
    agent_resources: dict | str | None = _option(
        None,
        "Resources of each of the agent_concurrency episodes on the Ray cluster, in Ray's names, as JSON, e.g. "
        '\'{"CPU": 2, "sandbox": 1}\'. Default: a quarter of a core.',
    )
    agent_timeout_s: float = _option(
        600.0, "Timeout of one episode, in seconds. One that fails is run again twice, then left out of its group."
    )
    agent_max_calls: int = _option(256, f"Calls that one episode may make, at most {MOST_CALLS}.")
    agent_max_tokens: int = _option(
        2**17, f"Tokens of one episode, sampled and prompted, in all its trajectories; at most {MOST_TOKENS}."
    )
    eval_dataset: str | None = _option(None, "Separate task or file to evaluate on. Default: held-out rows of --task.")
    eval_size: int | None = _option(
        None,
        "Number of questions held out for evaluation; never trained on. Default: 128, or with eval_dataset all that it "
        "has.",
    )
    train_size: int | None = _option(None, "Number of training questions. Default: all that the task has or generates.")
    prompt_column: str = _option("prompt", "Name of the prompt column in files and datasets.")
    run_id: str | None = _option(
        None,
        "Name of the run on the servers. Default: the run already in output_dir, else output_dir's name and a random "
        "suffix.",
    )
    init_adapter: str | None = _option(
        None, "Start from this PEFT adapter directory, with its LoRA settings, instead of a new adapter."
    )
    lora_kwargs: dict | str | None = _option(
        None, "Fields of peft.LoraConfig that have no flag, as JSON: rank_pattern, alpha_pattern, exclude_modules ..."
    )
    save_merged: bool = _option(
        False,
        "After training, also write the merged model to output_dir/merged, in bfloat16 (see learner export --merge).",
    )
    proof_every: int = _option(
        10, "Compare served and local logprobs every N steps, besides steps 0, 1, 2 and the last. 0: only at those."
    )
    proof_tolerance: float | None = _option(
        None,
        "Largest allowed |served - local| logprob difference in nats. Default: derived from the dtypes, see "
        "learner/sync/tolerance.py.",
    )
    proof_canary: bool = _option(
        True,
        "At startup, and halfway through the training where a server has room for another run, push a throw-away "
        "adapter with a large effect of every module to prove that adapters reach the logits.",
    )
    ready_timeout_s: float = _option(
        600.0, "Timeout of waiting for a ready rollout server, at startup and whenever none is up, in seconds."
    )
    push_timeout_s: float = _option(120.0, "Timeout of one adapter push, in seconds.")
    transport: Literal["auto", "http", "collective"] = _option(
        "auto",
        "Transport of adapter pushes: auto broadcasts over NCCL between different GPUs and uses HTTP otherwise; http; "
        "collective also broadcasts between CPUs (gloo).",
    )
    in_flight: Literal["drain", "keep", "carried"] = _option(
        "drain",
        "What happens to in-flight completions when a push lands: drain finishes them on their version; keep continues "
        "on the new version and recomputes their KV cache; carried continues on the new version with the old KV cache.",
    )
    max_staleness: int = _option(
        0,
        "Generation batches that rollouts may run ahead of training. 0: synchronous. S > 0: the next S batches are "
        "generated while the learner trains; staler samples are never trained on. The server needs S + 1 adapter slots "
        "(--slots-per-run), which `learner up` gives it.",
    )
    packed_passes: bool = _option(
        True,
        "Pack completions into forward and backward passes without padding, each distinct prompt once, and compute "
        "base and adapter of a layer as one product. A model that cannot be packed is trained as with false, and the "
        "log says why.",
    )
    max_tokens_per_pass: int | None = _option(
        None,
        "Tokens of one packed pass: bounds the memory of training, whatever per_device_train_batch_size is. Default: "
        "on a GPU what fits into six tenths of its free memory, found out in the first step, at most 8192, "
        "or 2**24 / hidden_size for narrow models; on a CPU 2048.",
    )
    compile: Literal["auto", "on", "off"] = _option(
        "auto",
        "Compile decoder layers with torch.compile on a GPU, for packed passes: auto after a few steps, if the rest of "
        "the training is long enough for it to pay; on from the first step.",
    )
    share_gpu: bool = _option(
        False,
        "Train on the rollout server's GPU: the server sleeps while the learner computes. Requires rollout-server "
        "--share-gpu, one server and one learner process.",
    )
    deterministic: bool = _option(
        False,
        "Derive sampling seeds from each prompt's position and use deterministic kernels, so that a killed and resumed "
        "run makes the same updates as an uninterrupted one. Requires rollout-server --deterministic.",
    )
    reward_workers: int = _option(
        2,
        "Reward worker processes per rank; each group is scored as soon as its completions arrive. 0: TRL calls reward "
        "functions in the learner's process, on the full batch after the last rollout: for functions that compare "
        "groups or keep state between calls.",
    )
    reward_backend: Literal["process", "ray"] = _option(
        "process",
        "Where reward workers run: process: on the learner's machine; ray: on the Ray cluster of $RAY_ADDRESS, or the "
        "one that this machine is a node of, for reward functions that need more cores or sandboxes than it has.",
    )
    reward_resources: dict | str | None = _option(
        None,
        'Resources of each reward worker on the Ray cluster, in Ray\'s names, as JSON, e.g. \'{"CPU": 4, "sandbox": '
        "1}'. Default: one core.",
    )
    reward_timeout_s: float = _option(
        60.0,
        "Timeout of a reward function per sample, in seconds. A call that exceeds it is killed and its sample is left "
        "out of the training.",
    )
    drop_degenerate_groups: bool = _option(
        False,
        "Replace zero-variance groups (no learning signal) by prompts of neighboring batches before training (DAPO's "
        "dynamic sampling). Requires reward_workers.",
    )
    degenerate_rounds: int = _option(
        4, "Maximum number of replacements per group; the last one is trained on even if its variance is zero."
    )
    generate_timeout_s: float = _option(1800.0, "Timeout of one generate request, in seconds.")
    metrics_port: int | None = _option(None, "Port of the learner's Prometheus endpoint. Default: no endpoint.")
    metrics_host: str = _option(
        "127.0.0.1",
        "Address that metrics_port binds to. The endpoint needs no token; it exposes numbers and names only.",
    )
    run_page: bool = _option(
        True, "Write output_dir/run.html during training: charts, settings, and sample completions."
    )
    page_port: int | None = _option(
        None, "Port to serve the run's page on, which then shows every step as it ends. Default: no live page."
    )
    page_host: str = _option(
        "127.0.0.1",
        "Address that page_port binds to. Anywhere but on the loopback the page needs the token in the URL that the "
        "log shows.",
    )
    token_file: str | None = _option(None, "File with the servers' bearer token. Default: $LOCKSTEP_TOKEN.")
    ca_file: str | None = _option(
        None,
        "CA certificate (PEM) to verify the servers' certificates with. Default: the public CAs, or $SSL_CERT_FILE.",
    )
    allow_base_mismatch: bool = _option(
        False, "Train even if the server's base model cannot be shown to be the learner's (e.g. dummy weights)."
    )
    allow_policy_altering: bool = _option(
        False,
        "Train even if the server uses speculative decoding or a quantized KV cache, so that its logprobs are not the "
        "policy's.",
    )
    keep_run: float = _option(
        0.0,
        "Seconds after the training for which no other run gets this one's place on the server. 0: it is served until "
        "another run needs the place. See learner runs.",
    )
    takeover: bool = _option(False, "Take the run over from another learner; pushes of that learner are then refused.")

    def __post_init__(self) -> None:
        for name in ("rollout_url", "reward_funcs", "tools"):
            if isinstance(one := getattr(self, name), str):
                setattr(self, name, [one])
        for name in ("task_args", "lora_kwargs", "agent_resources", "reward_resources"):
            setattr(self, name, json_object(getattr(self, name), name))
        for name, (least, what) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} {value} must {what}")
        if self.agent and self.agent_command:
            raise ValueError("agent and agent_command: there is one agent; give one of them")
        for name, most in (("agent_max_calls", MOST_CALLS), ("agent_max_tokens", MOST_TOKENS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} {getattr(self, name)} must be at most {most}")
        if self.keep_run > MAX_KEEP_SECONDS:
            raise ValueError(f"keep_run {self.keep_run:g} must be at most {MAX_KEEP_SECONDS} seconds, ten years")
        for name, what in (("metrics_port", "metrics"), ("page_port", "page")):
            if (port := getattr(self, name)) is not None and not 0 <= port <= 65535:
                raise ValueError(f"{name} {port}: a port is between 1 and 65535; 0 serves no {what}")
        if self.page_port and not self.run_page:
            raise ValueError("page_port: run_page false records nothing for a page; leave one of them out")
        if self.drop_degenerate_groups and not self.reward_workers:
            raise ValueError("drop_degenerate_groups: TRL computes rewards too late; set reward_workers to 1 or more")
        if self.reward_backend == "ray" and not self.reward_workers:
            raise ValueError("reward_backend ray: reward_workers 0 leaves rewards to TRL; give a number of workers")
        for kind in ("agent", "reward"):
            _check_resources(kind, getattr(self, f"{kind}_resources"), getattr(self, f"{kind}_backend"))
        if self.share_gpu and self.max_staleness:
            raise ValueError("share_gpu: rollouts that run ahead need their own GPU; leave max_staleness at 0")
        if self.deterministic and self.max_staleness:
            raise ValueError("deterministic: which rollouts a push overtakes varies; leave max_staleness at 0")
        if self.deterministic and self.in_flight != "drain":
            raise ValueError("deterministic: where in a completion a push lands varies; leave in_flight at drain")
        if self.run_id is not None and not re.match(RUN_ID_PATTERN, self.run_id):
            raise ValueError(f"run_id {self.run_id!r}: letters, digits, dot, dash and underscore, at most 64")

    def require_urls(self) -> list[str]:
        """Return the URLs as given; raise `InvalidRequest` without any, or with several where one must do."""
        if not self.rollout_url:
            raise InvalidRequest(f"give {option('rollout_url', 'http://127.0.0.1:8000')}, the rollout server's URL")
        several = len(self.rollout_url) > 1 or self.rollout_url[0].startswith(("dns+", "file:", "ray:"))
        for name, why in (
            ("deterministic", "which server completes a prompt depends on their speed"),
            ("share_gpu", "the learner runs on the GPU of one server"),
        ):
            if several and getattr(self, name):
                raise InvalidRequest(f"{name}: {why}; give one {option('rollout_url')}")
        return self.rollout_url

    def refuse_those_of_train(self) -> None:
        """Raise `InvalidRequest` for options that only `learner train` reads and that differ from their defaults."""
        given = {name: getattr(self, name) for name in _OF_TRAIN}
        usual = {name: getattr(LearnerConfig, name) for name in _OF_TRAIN}
        chosen = [name for name, value in given.items() if value != usual[name] and value not in ([], {})]
        if chosen:
            raise InvalidRequest(
                f"{', '.join(chosen)}: read by `learner train` only. A script gives data, rewards, tools and the "
                "adapter to its trainer, and merges with `learner export --merge`: leave it out"
            )

    def require_task(self) -> str:
        """Return `task`; raise `InvalidRequest` if it is missing."""
        if not self.task:
            raise InvalidRequest(f"give {option('task')}, e.g. reasoning_gym:chain_sum or FILE.jsonl")
        return self.task


def _check_resources(kind: str, resources: dict[str, Any], backend: str) -> None:
    """Check the resources that each agent, or reward worker, asks a Ray cluster for; raise `ValueError`."""
    if resources and backend != "ray":
        raise ValueError(f"{kind}_resources are those of a Ray cluster: set {kind}_backend to ray as well")
    for name, value in resources.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{kind}_resources: {name} is {value!r}; give a number that is not negative")


def json_object(value: dict | str | None, name: str) -> dict[str, Any]:
    """Return the JSON object that option `name` gives as text or as a dict; raise `ValueError` for anything else."""
    try:
        value = {} if value in (None, "") else json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value
