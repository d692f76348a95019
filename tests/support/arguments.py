"""Command lines of the tests."""

from __future__ import annotations

from collections.abc import Mapping


def arguments(options: Mapping[str, object]) -> list[str]:
    """Return command-line arguments: each flag, followed by its value unless that is None."""
    return [text for flag, value in options.items() for text in ([flag] if value is None else [flag, str(value)])]
