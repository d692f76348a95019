"""Task files, as they are written: text stays text, numbers stay numbers, and every object has its own keys only.

JSON, JSON Lines, CSV and TSV are read here and not by `datasets`, which guesses types: "2024-01-01" would reach a
reward as a date, and the 007 of a CSV as 7.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from learner.tasks.base import TaskError
from learner.tasks.columns import exact_dataset

#: Endings of task files; all but .parquet may be compressed (.gz).
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_SPACE = re.compile(r"\s*")
#: Longer integers take Python quadratic time to read.
_MAX_DIGITS = 4000
_GZIP = b"\x1f\x8b"


def kind_of(path: Path) -> str:
    """Return the ending of a task file, without a final .gz; it may be none of `FILE_KINDS`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def read_file(path: Path) -> Dataset:
    """Return the rows of a file.

    Every field of a CSV or TSV file is text, an empty one too: the format knows nothing else. A Parquet file has types.

    Raises:
        TaskError: the file cannot be read, or a value cannot be kept as it is; with row (from 1, without the header)
            and column.
    """
    kind = kind_of(path)
    if kind not in FILE_KINDS or (kind == ".parquet" and path.suffix == ".gz"):
        raise TaskError(f"{path}: a task file ends in {', '.join(FILE_KINDS)}, or one of the first four and .gz")
    if kind == ".parquet":
        try:
            rows = load_dataset("parquet", data_files=str(path), split="train")
        except Exception as error:  # the cause is chained below
            raise TaskError(f"{path} cannot be read: {_line(error.__cause__ or error)}") from error
    else:
        text = _text(path)
        columns = _json_columns(text, path) if kind in (".jsonl", ".json") else _csv_columns(text, path, kind)
        rows = exact_dataset(columns, str(path))
    if not len(rows):
        raise TaskError(f"{path} has no rows")
    return rows


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path} is not UTF-8 text: line {line}, {_line(error)}") from error
    except (OSError, EOFError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {_line(error)}") from error


@dataclass(frozen=True)
class _Unkept:
    """In place of a value that Python cannot hold as it is written."""

    why: str


def _json_columns(text: str, path: Path) -> dict[str, list[Any]]:
    """Read objects one after the other, or one list of them."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int)
    rows: list[Any] = []
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}, row {len(rows) + 1}, is not JSON: {_line(error)}") from error
        rows.append(row)
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    columns: dict[str, list[Any]] = {}
    for i, row in enumerate(rows):
        if isinstance(row, _Unkept):
            raise TaskError(f"{path}, row {i + 1}: {row.why}")
        if not isinstance(row, dict):
            raise TaskError(f"{path}, row {i + 1}, must be an object with a value for each column, not {row!r:.80}")
        for name, value in row.items():
            for unkept in _unkept(value):
                raise TaskError(f"{path}, row {i + 1}, column {name!r}: {unkept.why}")
            columns.setdefault(name, [None] * i).append(value)
        if len(row) < len(columns):
            for values in columns.values():
                values += [None] * (i + 1 - len(values))
    return columns


def _csv_columns(text: str, path: Path, kind: str) -> dict[str, list[Any]]:
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True)
    names, rows = list[str](), list[list[str]]()
    try:
        # A data frame's index has no name.
        header = next((fields for fields in lines if fields), [])
        names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        for fields in lines:
            if fields and len(fields) != len(names):
                raise TaskError(f"{path}, row {len(rows) + 1}, has {len(fields)} fields for {len(names)} columns")
            rows += [fields] if fields else []
    except csv.Error as error:
        raise TaskError(f"{path}, row {len(rows) + 1}, line {lines.line_num}: {error}") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise TaskError(f"{path} has two columns {twice[0]!r}: rename one")
    return {name: [fields[i] for fields in rows] for i, name in enumerate(names)}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Unkept:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    return _Unkept(f"an object has the key {next(name for name in names if names.count(name) > 1)!r} twice")


def _float(digits: str) -> float | _Unkept:
    """Return the double that prints as these digits again, however many they are."""
    value = float(digits)
    if value == 0.0:
        kept = not set("123456789") & set(digits.lower().partition("e")[0])
    elif kept := math.isfinite(value) and len(digits) > 16:
        exact = Decimal(digits)
        kept = Decimal(f"{value:.{len(exact.as_tuple().digits) - 1}e}") == exact
    else:
        kept = math.isfinite(value)
    if kept:
        return value
    return _Unkept(f"the number {digits:.60} does not fit into 64 bits: write it as text, in quotes")


def _int(digits: str) -> int | _Unkept:
    return int(digits) if len(digits) <= _MAX_DIGITS else _Unkept(f"an integer of {len(digits)} digits")


def _unkept(value: Any) -> Iterator[_Unkept]:
    if isinstance(value, _Unkept):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _unkept(part)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
