"""Seeds of prompts, derived from their place in the training instead of drawn: a resumed run has the same ones."""

from __future__ import annotations

import hashlib


def prompt_seed(base: int, *place: int | str) -> int:
    """A seed in [0, 2^62) for the prompt at `place` (say: training, micro-step, row) of a training seeded with `base`.

    vLLM adds the index of a completion to its prompt's seed, so neighbours must not be close to each other.
    """
    digest = hashlib.blake2b(repr((base, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
