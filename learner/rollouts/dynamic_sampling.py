"""Dynamic sampling as in DAPO (arXiv:2503.14476, 3.2): replace zero-variance groups before the training.

All completions of a zero-variance group have advantage 0: it costs as much as any other and gives no learning signal.
Replacements are rows of the generation batches around the present one, so that a curriculum stays one, drawn by seed
and batch: TRL's own order of prompts stays as it is, and a resumed training draws the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.protocols import ComingPrompts
from learner.rewards.scorer import Rewards
from learner.servers.router import GroupRequest
from shared.rollouts import Completion

Row = dict[str, Any]
#: Rewards closer to each other than this are equal, as for TRL's `frac_reward_zero_std`.
_EQUAL = 1e-8


def varies(rewards: Sequence[float]) -> bool:
    """Return whether two rewards of a group differ. NaN stands for a completion without a reward."""
    scored = [reward for reward in rewards if not math.isnan(reward)]
    return bool(scored) and max(scored) - min(scored) > _EQUAL


@dataclass
class GenerationBatch:
    """One generation batch of this rank: a dataset row, a prompt [P] and a completion in each row.

    Attributes:
        requested: the prompts before any was replaced.
        spare: rows and prompts of possible replacements, in the order in which they are tried.
        replaced: replacements that were made.
        kept: zero-variance groups that are left.
    """

    requested: list[list[int]]
    rows: list[Row]
    prompts: list[list[int]]
    spare: list[tuple[Row, list[int]]]
    completions: list[Completion] = field(default_factory=list)
    replaced: int = 0
    kept: int = 0


@dataclass
class DynamicSampling:
    """Replaces zero-variance groups; each batch is handled by one thread.

    Args:
        rewards: computes rewards as completions arrive.
        coming: reads rows of neighboring batches.
        seed_of: maps a row of the batch and its prompt to a seed, or to None.
        size: completions of a group.
        rounds: how often a group is replaced at most; a zero-variance group that is left then is trained on.

    Attributes:
        replaced, kept: as in `GenerationBatch`, over all batches that were taken.
    """

    rewards: Rewards
    coming: ComingPrompts
    seed_of: Callable[[int, list[int]], int | None]
    size: int
    rounds: int
    replaced: int = field(default=0, init=False)
    kept: int = field(default=0, init=False)
    _batches: dict[int, GenerationBatch] = field(default_factory=dict, init=False)

    def expect(self, number: int, rows: Sequence[Row], prompts: list[list[int]]) -> None:
        """Prepare for generation batch `number` of these rows and prompts; called on the trainer's thread."""
        if number not in self._batches or self._batches[number].requested != prompts:
            spare_rows = self.coming.spare_rows(number, self.rounds * (len(rows) // self.size))
            spare_ids = self.coming.token_ids(spare_rows) if spare_rows else []
            spare = list(zip(spare_rows, spare_ids, strict=True))
            self._batches[number] = GenerationBatch(prompts, list(rows), list(prompts), spare)
            self.rewards.expect(number, rows)

    def replace(
        self, number: int, completions: list[Completion], dispatch: Callable[[list[GroupRequest]], list[Completion]]
    ) -> list[Completion]:
        """Replace zero-variance groups and return the completions to train on.

        Args:
            completions: of the batch as it was expected.
            dispatch: returns completions in row order.
        """
        batch, size = self._batches[number], self.size
        batch.completions = completions
        spare, flat = iter(batch.spare), self._zero_variance(number, range(0, len(batch.rows), size))
        for _ in range(self.rounds):
            chosen = dict(zip(flat, spare, strict=False))
            if not chosen:
                break
            for first, (row, prompt) in chosen.items():
                batch.rows[first : first + size] = [dict(row) for _ in range(size)]
                batch.prompts[first : first + size] = [prompt] * size
            self.rewards.expect(number, batch.rows)
            requests = [GroupRequest(row, ids, size, self.seed_of(row, ids)) for row, (_, ids) in chosen.items()]
            fresh = iter(dispatch(requests))
            for first in chosen:
                batch.completions[first : first + size] = [next(fresh) for _ in range(size)]
            batch.replaced += len(chosen)
            flat = [first for first in flat if first not in chosen] + self._zero_variance(number, chosen)
        batch.kept = len(flat)
        return batch.completions

    def prompts(self, number: int) -> list[list[int]] | None:
        """Return the prompts of a batch after replacement; None if it is not expected."""
        batch = self._batches.get(number)
        return batch.prompts if batch else None

    def take(self, number: int) -> GenerationBatch:
        """Return a batch after replacement, and forget it and all before it."""
        batch = self._batches[number]
        self._batches = {known: other for known, other in self._batches.items() if known > number}
        self.replaced += batch.replaced
        self.kept += batch.kept
        return batch

    def _zero_variance(self, number: int, firsts: Iterable[int]) -> list[int]:
        """Return the first rows of the zero-variance groups among those that begin at `firsts`."""
        # All are passed on, in case a notification was lost: what is being scored already is not scored twice.
        self.rewards.arrived(number, 0, self._batches[number].completions)
        return [first for first in firsts if not varies(self.rewards.totals(number, first))]
