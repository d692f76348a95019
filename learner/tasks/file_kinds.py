"""Endings of task files; without `datasets`, so that commands can look before they import it."""

from __future__ import annotations

from pathlib import Path

#: All but .parquet may be compressed (.gz).
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def kind_of(path: Path) -> str:
    """Return the ending of a task file, without a final .gz; it may be none of `FILE_KINDS`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix
