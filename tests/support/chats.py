"""Completions as TRL gives them to reward functions."""

from __future__ import annotations


def said(*texts: str) -> list[list[dict[str, str]]]:
    """Return a completion of a chat for each text."""
    return [[{"role": "assistant", "content": text}] for text in texts]
