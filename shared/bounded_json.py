"""JSON from the network: bounded before it is parsed, because a byte of it can become fifty bytes of objects."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from dataclasses import dataclass
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # not in typeshed
from typing import Any

#: A shorter document costs next to nothing, whatever its shape.
SMALL = 2**16
_MAX_NESTING = 100
_QUOTED = re.compile(rb'"[^"]*+"?')
_STRING_OR_BRACKET = re.compile(rb'"[^"]*+"?|[\[\]{}]')
#: Of one list or object without others in it, which is parsed at one go.
_MAX_FLAT_VALUES, _MAX_FLAT_STRINGS = 2**20, 2**17
#: Bytes of memory that Python's objects take, at most: a number and its place in two lists, a string, an object.
_VALUE, _STRING, _CONTAINER = 48, 80, 400
_QUOTE = ord('"')


@dataclass(frozen=True)
class JsonLimits:
    """How many of each a document may hold: values, strings (names, too), objects and lists together."""

    values: int
    strings: int
    containers: int

    def check(self, document: bytes) -> int:
        """Count without making objects; return the memory in bytes that the parsed document takes at most.

        Raises:
            ValueError: there are too many, or they are nested too deeply, or it is not UTF-8.
        """
        if b"\0" in document[:4]:
            raise UnicodeError("the JSON is not in UTF-8: encode it so")
        plain = document.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in document else document
        strings, containers = plain.count(b'"') // 2 + 1, 0
        _check("strings", strings, self.strings)
        values = _values(plain, self.values)
        _check("values", values, self.values)
        if plain.count(b"[") + plain.count(b"{") > _MAX_NESTING:
            containers = self._containers(plain)
        elif len(plain) > SMALL:
            _check_flat(plain, 0, len(plain))
        return len(document) + _VALUE * values + _STRING * strings + _CONTAINER * containers

    def _containers(self, plain: bytes) -> int:
        depth = containers = flat = 0
        for match in _STRING_OR_BRACKET.finditer(plain):
            byte, place = plain[match.start()], match.start()
            if byte == _QUOTE:
                continue
            if place - flat > _MAX_FLAT_STRINGS:
                _check_flat(plain, flat, place)
            flat = place
            if byte in b"[{":
                depth, containers = depth + 1, containers + 1
                if depth > _MAX_NESTING:
                    raise ValueError(f"the JSON is nested more than {_MAX_NESTING} levels deep")
                _check("objects and lists", containers, self.containers)
            elif byte in b"]}":
                depth -= 1
        return containers


def _check_flat(plain: bytes, start: int, end: int) -> None:
    _check("strings in one list", plain.count(b'"', start, end) // 2, _MAX_FLAT_STRINGS)
    if plain.count(b",", start, end) > _MAX_FLAT_VALUES:
        _check("values in one list", _values(plain[start:end], _MAX_FLAT_VALUES), _MAX_FLAT_VALUES)


def _values(plain: bytes, limit: int) -> int:
    """Count the values; commas in strings count only where they cannot matter."""
    commas = plain.count(b",")
    return 1 + (_QUOTED.sub(b"", plain).count(b",") if commas > limit else commas)


def _check(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"the JSON holds more than {limit} {what}")


def load_json(document: bytes) -> Any:
    """Parse a document that `JsonLimits.check` has let through; other threads may run in between.

    Raises:
        json.JSONDecodeError: also where Python's parser raises something else.
    """
    try:
        return _StepwiseDecoder(object_hook=_let_others_run).decode(
            document.removeprefix(BOM_UTF8).decode("utf-8", "surrogatepass")
        )
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; text that is no UTF-8
        raise json.JSONDecodeError(str(error), "", 0) from error


class _StepwiseDecoder(json.JSONDecoder):
    """Python's decoder, which reads at one go, but for the outermost object and the lists in it: item by item."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._at_one_go: Any = self.scan_once  # type: ignore[has-type]
        self.scan_once = self._scan_object

    def _scan_object(self, text: str, place: int) -> Any:
        if text[place : place + 1] == "{":
            return JSONObject((text, place + 1), True, self._scan_list, None, None)
        return self._scan_list(text, place)

    def _scan_list(self, text: str, place: int) -> Any:
        if text[place : place + 1] == "[":
            return JSONArray((text, place + 1), self._at_one_go)
        return self._at_one_go(text, place)


def _let_others_run(document: dict[str, Any]) -> dict[str, Any]:
    return document  # bytecode: the interpreter can switch threads here, and within its parser it cannot
