"""TRL without vLLM, which it imports where it is installed, for trainers that generate in their own process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_vllm() -> Iterator[None]:
    """Let TRL's trainers be imported in the block without vLLM, whose import takes seconds.

    For a process of ours alone: in it, `use_vllm=True` finds no vLLM.
    """
    from trl import import_utils

    before = import_utils.is_vllm_available
    import_utils.is_vllm_available = lambda min_version=None: False
    try:
        yield
    finally:
        import_utils.is_vllm_available = before
