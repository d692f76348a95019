"""Record sample completions from TRL's logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl import GRPOTrainer

from learner.monitors.samples import COMPLETION_CHARACTERS, PROMPT_CHARACTERS, Sample, choose, text_of, total
from learner.rollouts.completions import oldest_step
from learner.run_dir.files import finite
from learner.session import Session


def record_samples(trainer: GRPOTrainer, session: Session, add: Callable[[int, list[Sample]], None]) -> None:
    """Pass samples of every training batch to `add`, with the step that trains on it, once TRL has scored it."""
    generate = trainer._generate_and_score_completions

    def generate_and_record(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = generate(inputs)
        if trainer.model.training:
            add(trainer.state.global_step + 1, _samples(trainer, session))
        return batch

    trainer._generate_and_score_completions = generate_and_record


def _samples(trainer: GRPOTrainer, session: Session) -> list[Sample]:
    """Return samples of the batch that TRL has just scored; its logs hold the rows of all ranks, this one's first."""
    logs, weights = trainer._logs, trainer.reward_weights.tolist()
    columns = {name: list(map(finite, logs["rewards"][name])) for name in trainer.reward_func_names}
    rewards = [total(row, weights) for row in zip(*columns.values(), strict=True)]
    # Of several turns only the first is known.
    own = [] if trainer.tools else session.rollouts.last_completions
    prompts, completions, advantages = (list(logs[name]) for name in ("prompt", "completion", "advantages"))
    batch, schedule = session.generation_batch, session.trainer.schedule
    samples = []
    for row, why in choose(rewards).items():
        known: dict[str, Any] = {}
        if row < len(own):
            known = {
                "tokens": len(own[row].token_ids),
                "finish_reason": own[row].finish_reason,
                "spans": [(s.version.step, s.start, s.end, s.kv) for s in own[row].spans if s.version],
                "lag": schedule.staleness(batch, oldest_step(own[row])),
            }
        samples.append(
            Sample(
                why,
                text_of(prompts[row], PROMPT_CHARACTERS),
                text_of(completions[row], COMPLETION_CHARACTERS),
                rewards[row],
                {name: column[row] for name, column in columns.items()},
                finite(advantages[row]),
                **known,
            )
        )
    return samples
