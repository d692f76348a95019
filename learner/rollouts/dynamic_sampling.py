"""DAPO's dynamic sampling (arXiv:2503.14476, 3.2): groups whose rewards do not vary are replaced before the training.

All completions of such a group have advantage 0, so it costs what any other costs and teaches nothing. Replacements are
other rows of the dataset, derived from the seed and the generation batch: TRL's own order of prompts stays as it is,
and a resumed training draws the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.rewards.scorer import Rewards
from learner.rollouts.dispatch import Ask, SeedOf
from shared.rollouts import Completion

Row = dict[str, Any]
Fetch = Callable[[list[Ask]], list[Completion]]
#: Rewards closer to each other than this are equal, as for TRL's `frac_reward_zero_std`.
_EQUAL = 1e-8


def varies(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: two of its rewards differ. NaN stands for a completion without a reward."""
    scored = [reward for reward in rewards if not math.isnan(reward)]
    return bool(scored) and max(scored) - min(scored) > _EQUAL


@dataclass
class Draw:
    """One generation batch of this rank: a dataset row, a prompt [P] and a completion in each row.

    Attributes:
        asked: the prompts before any was replaced.
        spare: rows and prompts that may take a group's place, in the order in which they are tried.
        replaced, kept: replacements that were made, and groups that do not vary all the same.
    """

    asked: list[list[int]]
    rows: list[Row]
    prompts: list[list[int]]
    spare: list[tuple[Row, list[int]]]
    completions: list[Completion] = field(default_factory=list)
    replaced: int = 0
    kept: int = 0


class DynamicSampling:
    """Replaces groups whose rewards do not vary; each batch is filled by one thread.

    Attributes:
        replaced, kept: over all batches that were taken.

    Args:
        rewards: computes rewards as completions arrive.
        spare_of: generation batch and a number -> as many rows and prompts that are not in it, or fewer; called on the
            trainer's thread.
        seed_of: row of the batch and its prompt -> its seed, where seeds are derived.
        size: completions of a group.
        rounds: how often a group is replaced at most; what does not vary then is trained on as it is.
    """

    def __init__(
        self,
        rewards: Rewards,
        spare_of: Callable[[int, int], list[tuple[Row, list[int]]]],
        seed_of: SeedOf,
        *,
        size: int,
        rounds: int,
    ) -> None:
        self._rewards, self._spare_of, self._seed_of = rewards, spare_of, seed_of
        self._size, self._rounds = size, rounds
        self._draws: dict[int, Draw] = {}
        self.replaced = self.kept = 0

    def expect(self, batch: int, rows: Sequence[Row], prompts: list[list[int]]) -> None:
        """A generation batch is going to be generated, from these rows and prompts."""
        known = self._draws.get(batch)
        if known is None or known.asked != prompts:
            spare = self._spare_of(batch, self._rounds * (len(rows) // self._size))
            self._draws[batch] = Draw(prompts, list(rows), list(prompts), spare)
            self._rewards.expect(batch, rows)

    def fill(self, batch: int, completions: list[Completion], fetch: Fetch) -> list[Completion]:
        """The completions to train on, once groups whose rewards do not vary have been replaced.

        Args:
            completions: of the batch as it was expected.
            fetch: completions in row order.
        """
        draw, size = self._draws[batch], self._size
        draw.completions = completions
        spare, flat = iter(draw.spare), self._flat(batch, draw, range(0, len(draw.rows), size))
        for _ in range(self._rounds):
            places = dict(zip(flat, spare, strict=False))
            if not places:
                break
            for first, (row, prompt) in places.items():
                draw.rows[first : first + size] = [dict(row) for _ in range(size)]
                draw.prompts[first : first + size] = [prompt] * size
            self._rewards.expect(batch, draw.rows)
            fresh = iter(
                fetch([Ask(first, ids, size, self._seed_of(first, ids)) for first, (_, ids) in places.items()])
            )
            for first in places:
                draw.completions[first : first + size] = [next(fresh) for _ in range(size)]
            draw.replaced += len(places)
            flat = [first for first in flat if first not in places] + self._flat(batch, draw, places)
        draw.kept = len(flat)
        return draw.completions

    def prompts(self, batch: int) -> list[list[int]] | None:
        """The prompts of a batch as it is now; None where it is not expected."""
        draw = self._draws.get(batch)
        return draw.prompts if draw else None

    def take(self, batch: int) -> Draw:
        """A filled batch; what came before is forgotten."""
        draw = self._draws[batch]
        self._draws = {known: other for known, other in self._draws.items() if known > batch}
        self.replaced += draw.replaced
        self.kept += draw.kept
        return draw

    def _flat(self, batch: int, draw: Draw, firsts: Iterable[int]) -> list[int]:
        """First rows of the groups that teach nothing."""
        # All are handed on, in case one was lost on the way: what is being scored already is not scored twice.
        self._rewards.arrived(batch, 0, draw.completions)
        return [first for first in firsts if not varies(self._rewards.totals(batch, first))]
