"""The prompts of coming generation batches, read on an index sampler of its own: TRL's loader is never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Protocol


class IndexSampler(Protocol, Sized):
    """What is needed of `trl.trainer.utils.RepeatSampler`: each iteration is one epoch."""

    def __iter__(self) -> Iterator[int]: ...


def skip_epochs(sampler: IndexSampler, epochs: int) -> None:
    """Bring a fresh sampler to where it is after so many epochs: an epoch's order is drawn at its first index."""
    for _ in range(epochs):
        next(iter(sampler))


class Lookahead:
    """Dataset indices of any generation batch, in the order in which TRL's sampler yields them.

    Args:
        make_sampler: a new sampler, as the trainer's loader got one.
        rows: rows of one generation batch, over all ranks.
        repeats: how often the sampler yields every generation batch.
        per_epoch: generation batches per epoch.
    """

    def __init__(self, make_sampler: Callable[[], IndexSampler], *, rows: int, repeats: int, per_epoch: int) -> None:
        self._make_sampler = make_sampler
        self._rows, self._repeats, self._per_epoch = rows, repeats, per_epoch
        self._next = -1
        self._indices: Iterator[int] = iter(())
        self._sampler: IndexSampler | None = None

    def indices(self, batch: int) -> list[int]:
        """Indices into the dataset [rows], one per completion. Cheapest in ascending order of `batch`."""
        epoch, within = divmod(batch, self._per_epoch)
        if batch != self._next:
            self._sampler = self._make_sampler()
            skip_epochs(self._sampler, epoch)
            self._indices = iter(self._sampler)
            self._take(within * self._rows * self._repeats)
        elif within == 0 and self._sampler is not None:
            self._indices = iter(self._sampler)
        self._next = batch + 1
        return self._take(self._rows * self._repeats)[: self._rows]

    def _take(self, count: int) -> list[int]:
        return list(islice(self._indices, count))
