"""Task files, as they are written: text stays text, numbers stay numbers, and every object has its own keys only.

JSON, JSON Lines, CSV and TSV are read here and not by `datasets`, which guesses types: "2024-01-01" would reach a
reward as a date, and the 007 of a CSV as 7.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from learner.tasks.base import TaskError
from learner.tasks.columns import exact_dataset
from learner.tasks.file_kinds import FILE_KINDS, kind_of

_SPACE = re.compile(r"\s*")
#: Longer integers take Python quadratic time to read.
_MAX_DIGITS = 4000
_GZIP = b"\x1f\x8b"


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
            rows = load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        except Exception as error:  # the cause is chained below
            raise TaskError(f"{path} cannot be read: {_line(error.__cause__ or error)}") from error
    else:
        lines = _lines(path)
        columns = _json_columns(lines, path) if kind in (".jsonl", ".json") else _csv_columns(lines, path, kind)
        rows = exact_dataset(columns, str(path))
    if not len(rows):
        raise TaskError(f"{path} has no rows")
    return rows


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines one after the other: a file may be larger than what every rank can hold twice."""
    number = 0
    try:
        with path.open("rb") as file:
            data: Any = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == _GZIP else file
            for number, line in enumerate(io.TextIOWrapper(data, "utf-8-sig", newline=""), 1):  # noqa: B007
                yield line
    except UnicodeDecodeError as error:
        line_number = number + 1 + error.object.count(b"\n", 0, error.start)
        raise TaskError(f"{path} is not UTF-8 text: line {line_number}, {_line(error)}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TaskError(f"{path} cannot be read: {_line(error)}") from error


@dataclass(frozen=True)
class _Unkept:
    """In place of a value that Python cannot hold as it is written."""

    why: str


def _json_values(lines: Iterable[str], path: Path) -> Iterator[Any]:
    """Yield JSON values that come one after the other; each may take one line, several, or a part of one."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int)
    text, tried, first_line, count = "", 0, 1, 0
    for line in chain(lines, [None]):
        text += line or ""
        if line is not None and len(text) < 2 * tried:  # or a long value would be tried again with each of its lines
            continue
        at = _SPACE.match(text).end()  # type: ignore[union-attr]
        tried = 0
        while at < len(text) and not tried:
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if line is None:
                    where = first_line + text.count("\n", 0, getattr(error, "pos", at))
                    why = getattr(error, "msg", None) or _line(error)
                    raise TaskError(f"{path}, row {count + 1}, is not JSON: {why} (line {where})") from error
                tried = len(text) - at  # it may go on in the next line
            else:
                count += 1
                yield value
                at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        first_line += text.count("\n", 0, at)
        text = text[at:]


def _json_columns(lines: Iterable[str], path: Path) -> dict[str, list[Any]]:
    """Read objects one after the other, or one list of them."""
    found = _json_values(lines, path)
    first = list(islice(found, 2))
    rows: Iterable[Any] = first[0] if len(first) == 1 and isinstance(first[0], list) else chain(first, found)
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


def _csv_columns(lines: Iterable[str], path: Path, kind: str) -> dict[str, list[Any]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    columns, row = dict[str, list[Any]](), 0
    try:
        # A data frame's index has no name.
        header = next((fields for fields in reader if fields), [])
        names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise TaskError(f"{path} has two columns {twice[0]!r}: rename one")
        columns = {name: [] for name in names}
        for row, fields in enumerate((fields for fields in reader if fields), 1):
            if len(fields) != len(names):
                raise TaskError(f"{path}, row {row}, has {len(fields)} fields for {len(names)} columns")
            for values, field in zip(columns.values(), fields, strict=True):
                values.append(field)
    except csv.Error as error:
        raise TaskError(f"{path}, row {row + 1}, line {reader.line_num}: {error}") from error
    return columns


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
