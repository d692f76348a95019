"""Stochastic rounding to bfloat16 of what is merged: seeds, and how much of an update arrived.

Rounded to nearest, an update below half a unit in the last place of its weight vanishes. With 16 random bits added
below the cut a weight is rounded up with the probability of what is cut off, so that updates arrive on average.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

#: Bits of float32 that bfloat16 does not have.
CUT_BITS = 16


def rounding_seed(checksum: str, block: str) -> int:
    """Return the seed of a block's random bits: the same adapter gives the same weights everywhere."""
    return xxhash.xxh3_64_intdigest(f"{checksum} {block}".encode()) >> 1


class Arrived(NamedTuple):
    """Sums over the elements of updates, d meant and e made: of e d, of d², and of (e - d)²."""

    product: float = 0.0
    meant: float = 0.0
    lost: float = 0.0

    def plus(self, other: Arrived) -> Arrived:
        """Return the sums over both."""
        return Arrived(*(one + another for one, another in zip(self, other, strict=True)))

    @property
    def share(self) -> float | None:
        """The regression of e on d: 1 if all arrived; None if nothing was meant."""
        return self.product / self.meant if self.meant else None

    @property
    def error(self) -> float | None:
        """||e - d|| / ||d||; None if nothing was meant."""
        return (self.lost / self.meant) ** 0.5 if self.meant else None
