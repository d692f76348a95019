"""Hooks around methods of a `trl.GRPOTrainer`; `learner.trainer.attach` lists them in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from trl import GRPOTrainer

from learner.adapters.quantization import pin_compute_dtype
from learner.agents.trajectories import Episode
from learner.monitors.samples import EVALUATION, TRAINING, Group, make_group, total
from learner.rollouts.completions import oldest_step, sampled_length
from learner.rollouts.dynamic_sampling import DynamicSampling
from learner.rollouts.generation import RemoteRollouts
from learner.rollouts.mismatch import Mismatch, measure
from learner.run_dir.files import finite
from learner.session import Session
from learner.trainer.agent_hooks import shown_turns
from learner.trainer.between_trainings import forget_between_trainings
from shared.rollouts import Completion


def generate_with(trainer: GRPOTrainer, rollouts: RemoteRollouts) -> None:
    """Set what the constructor sets with use_vllm=True and vllm_mode="server".

    Everything else it sets is the same in both cases, but for `generation_config`, which is then not read. The check of
    loss_type=vespo is made in `check_grpo`, that of the server's logprobs_mode in `check_server`.
    """
    trainer.use_vllm = True
    trainer.vllm_mode = "server"
    trainer.vllm_generation = rollouts
    trainer._last_loaded_step = -1
    if trainer.accelerator.device.type == "cpu":
        trl.trainer.utils._use_triton = _picks_scored_positions
        pin_compute_dtype(trainer.model)


def _picks_scored_positions(device: torch.device) -> bool:
    """Return whether TRL runs the language-model head on the completion's positions only, or on the prompt's too.

    TRL asks this of Triton, since a number of positions that changes would recompile elsewhere. A CPU compiles nothing.
    """
    return device.type == "cpu" or trl.kernels.chunked_logprob._use_triton(device)


def begin_passes_with(trainer: GRPOTrainer, begin: Callable[[], None]) -> None:
    """Call `begin` before each of TRL's forward passes: of the policy, also in the loss, and of the reference."""
    score = trainer._get_per_token_logps_and_entropies

    def scored_after(*args: Any, **kwargs: Any) -> Any:
        begin()
        return score(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = scored_after


def report_failure(trainer: GRPOTrainer, failed: Callable[[BaseException], None]) -> None:
    """Call `failed` with the error that a training ends with."""
    train = trainer.train

    def train_or_report(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            failed(error)
            raise

    trainer.train = train_or_report


def mark_tool_loop(trainer: GRPOTrainer, rollouts: RemoteRollouts) -> None:
    """Tell `rollouts` which generations of TRL continue completions after a tool call."""
    loop = trainer._tool_call_loop

    def marked_loop(*args: Any, **kwargs: Any) -> Any:
        with rollouts.tool_loop():
            return loop(*args, **kwargs)

    trainer._tool_call_loop = marked_loop


def watch_mismatch(trainer: GRPOTrainer, saw: Callable[[Mismatch], None]) -> None:
    """Pass the mismatch of every training batch to `saw`; TRL keeps no ratio from before its clipping.

    TRL scores a batch before its loss only where it needs these logprobs. Where it does not, the loss's own are taken:
    of the first optimizer step on the batch, whose weights are those that the batch was requested for.
    """
    args = trainer.args
    measured = partial(
        measure,
        total=partial(trainer.accelerator.reduce, reduction="sum"),
        mode=args.vllm_importance_sampling_mode if args.vllm_importance_sampling_correction else None,
        clip_min=args.vllm_importance_sampling_clip_min,
        clip_max=args.vllm_importance_sampling_clip_max,
        off_policy_threshold=args.off_policy_mask_threshold,
    )
    generate, compute = trainer._generate_and_score_completions, trainer._compute_loss
    score = trainer._get_per_token_logps_and_entropies
    unmeasured = _Unmeasured()

    def generate_and_measure(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = generate(inputs)
        if trainer.model.training and "sampling_per_token_logps" in batch:
            if "old_per_token_logps" in batch:
                saw(measured(batch))
            else:
                unmeasured.begin()
        return batch

    def compute_seen(model: Any, inputs: dict[str, Any]) -> Any:
        unmeasured.inputs = inputs if trainer.model.training else None
        try:
            loss = compute(model, inputs)
        finally:
            unmeasured.inputs = None
        if trainer.model.training and trainer.accelerator.sync_gradients and unmeasured.parts is not None:
            saw(measured(unmeasured.end()))
        return loss

    def score_seen(*positional: Any, **options: Any) -> Any:
        scored = score(*positional, **options)
        unmeasured.add(scored[0])
        return scored

    forget_between_trainings(trainer, unmeasured.forget)
    trainer._generate_and_score_completions = generate_and_measure
    trainer._compute_loss = compute_seen
    trainer._get_per_token_logps_and_entropies = score_seen


class _Unmeasured:
    """Micro-batches of one optimizer step whose mismatch is not measured before all are scored.

    Attributes:
        inputs: of the loss that is being computed.
        parts: what `measure` needs of each micro-batch so far; None: nothing is to be measured.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self.parts: list[dict[str, torch.Tensor]] | None = None

    def begin(self) -> None:
        self.parts = []

    def forget(self) -> None:
        self.parts = None

    def add(self, logps: torch.Tensor) -> None:
        if self.parts is None or self.inputs is None:
            return
        names = ("sampling_per_token_logps", "completion_mask", "tool_mask", "advantages")
        part = {name: self.inputs[name] for name in names if name in self.inputs}
        self.parts.append({**part, "old_per_token_logps": logps.detach()})

    def end(self) -> dict[str, torch.Tensor]:
        parts, self.parts = self.parts or [], None
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def replace_zero_variance_groups(trainer: GRPOTrainer, dynamic: DynamicSampling, rollouts: RemoteRollouts) -> None:
    """Let TRL train on rows and completions after zero-variance groups were replaced."""
    generate, logged = trainer._generate_and_score_completions, trainer._metrics["train"]

    def generate_replaced(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not trainer.model.training:
            return generate(inputs)
        number = rollouts.trainer.generation_batch
        prompts = dynamic.coming.token_ids(inputs)
        rollouts.sync_weights()
        dynamic.expect(number, inputs, prompts)
        completions = rollouts.complete(prompts)
        batch = dynamic.take(number)
        rollouts.hold(batch.prompts, completions)
        for name, count in (("replaced", batch.replaced), ("kept", batch.kept)):
            logged[f"lockstep/degenerate_{name}"].append(float(count))
        return generate(batch.rows)

    trainer._generate_and_score_completions = generate_replaced


def record_samples(trainer: GRPOTrainer, session: Session, add: Callable[[int, str, list[Group]], None]) -> None:
    """Pass every training batch, and the first batch of every evaluation, to `add` once TRL has scored it.

    `add` is called with the step that trains on it, or is evaluated, with the kind, and with the groups.
    """
    generate, calculate = trainer._generate_and_score_completions, trainer._calculate_rewards
    scored: list[dict[str, Any]] = []  # the rows of this rank, as they were scored: after replacement
    evaluated: int | None = None

    def calculate_noted(inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> torch.Tensor:
        scored[:] = inputs
        return calculate(inputs, *args, **kwargs)

    def generate_and_record(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal evaluated
        batch, step = generate(inputs), trainer.state.global_step
        if trainer.model.training:
            add(step + 1, TRAINING, _groups(trainer, session, scored, trainer.num_generations))
        elif evaluated != step:
            add(step, EVALUATION, _groups(trainer, session, scored, trainer.num_generations_eval))
            evaluated = step
        return batch

    trainer._calculate_rewards = calculate_noted
    trainer._generate_and_score_completions = generate_and_record


def _episode_facts(trainer: GRPOTrainer, episode: Completion, conversation: Any) -> dict[str, Any]:
    """Return what a sample says of an agent's episode: nothing of other completions."""
    if not isinstance(episode, Episode):
        return {}
    facts: dict[str, Any] = {"calls": episode.calls, "trajectories": episode.trajectories}
    if not episode.failure and (isinstance(conversation, list) or episode.trajectories > 1):
        facts["turns"] = shown_turns(trainer, episode)
    return facts


def _groups(trainer: GRPOTrainer, session: Session, rows: list[dict[str, Any]], size: int) -> list[Group]:
    """Return the groups of `size` of the batch that TRL has just scored.

    TRL's logs end with the rows of all ranks, this one's first, of which `rows` are known; they hold no more rows than
    a training batch has.
    """
    logs, weights = trainer._logs, trainer.reward_weights.tolist()
    count = len(rows) * trainer.accelerator.num_processes
    names = trainer.reward_func_names
    prompts, completions, advantages, *columns = (
        list(log)[-count:]
        for log in (*(logs[n] for n in ("prompt", "completion", "advantages")), *map(logs["rewards"].get, names))
    )
    first = count - len(prompts)  # of a larger batch of an evaluation, the rows that the logs have forgotten
    own = [] if trainer.tools else session.rollouts.last_completions  # of several turns only the first is known
    batch, schedule = session.trainer.generation_batch, session.trainer.schedule
    groups = []
    for start in range(-(-first // size) * size, count, size):
        numbers = []
        for row in range(start, min(start + size, count)):
            rewards = [finite(column[row - first]) for column in columns]
            known: dict[str, Any] = {}
            if row < len(own):
                known = {
                    "tokens": sampled_length(own[row]),
                    "finish_reason": own[row].finish_reason,
                    "spans": [(s.version.step, s.start, s.end, s.kv) for s in own[row].spans if s.version],
                    "lag": schedule.staleness(batch, oldest_step(own[row])) if trainer.model.training else None,
                    **_episode_facts(trainer, own[row], completions[row - first]),
                }
            scores = {"reward": total(rewards, weights), "rewards": dict(zip(names, rewards, strict=True))}
            numbers.append({**scores, "advantage": finite(advantages[row - first]), **known})
        there = slice(start - first, start - first + len(numbers))
        columns_of = rows[start] if start < len(rows) else {}
        groups.append(make_group(prompts[there.start], columns_of, completions[there], numbers))
    return groups
