"""Bounds on the format of completions (structured outputs): what a grammar may cost before anything compiles it.

A compiled grammar has about as many positions as its text has characters once all repeats are written out, and at each
of them the whole vocabulary is looked at. Nothing can end a compilation, so its cost is bounded before it begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from shared.bounded_json import JsonLimits, load_json

#: Characters with all repeats written out. A repeat costs more than its copies: the tokens that reach beyond each of
#: them are looked at, too.
MAX_COST = 32768
_REPEAT_COST, _REPEATS_THAT_COST = 20, 50
#: A repeat in a schema's pattern is read in a time that grows with its square, while nothing else is answered: 90
#: copies of copies of a character take as long as a character takes to compile.
_SQUARES = 90
#: Characters as they are sent; descriptions in a schema count here, but cost nothing.
MAX_CHARACTERS = 2**18
_LIMITS = JsonLimits(values=2**15, strings=2**15, containers=2**13)
_MAX_NESTING = 64  # vLLM's
_HUGE = 10**9
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
_LARK_REPEAT = re.compile(r"~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
_NUMBER = re.compile(r"(?<!\w)\d+")
_SIMPLE = re.compile(r"[^\\\[(){}\"'~|\d]+")
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
_IGNORED = frozenset({"description", "title", "$comment", "examples", "default", "$schema", "$id"})
_COUNTS = re.compile(r"(min|max)(Items|Length|Properties|Contains)")
_BRANCHES = ("anyOf", "oneOf")
_PATTERNS = ("pattern", "regex", "grammar")  # the last two of structural tags


def check_structured_outputs(
    *,
    json_schema: str | dict[str, Any] | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
    structural_tag: str | dict[str, Any] | None = None,
) -> None:
    """Check whichever of the forms is given; raises `ValueError` with the bound that it passes."""
    if isinstance(json_schema, str | dict):
        _Schema(_document("json", json_schema)).check("json")
    if isinstance(structural_tag, str | dict):
        _Schema(_document("structural_tag", structural_tag)).check("structural_tag")
    if isinstance(choice, list):
        _check_cost("choice", sum(1 + len(str(each)) for each in choice))
    for name, text in (("regex", regex), ("grammar", grammar)):
        if isinstance(text, str):
            _check_characters(name, len(text))
            _check_cost(name, expanded_length(text, grammar=name == "grammar"))


def expanded_length(pattern: str, *, grammar: bool = False, in_schema: bool = False) -> int:
    """Count the characters of a regular expression with all its repeats written out.

    Args:
        grammar: it is EBNF or Lark: quotes hold literals, and any number outside of them may be a repeat.
        in_schema: it is a pattern of a JSON schema, whose repeats cost more.
    """
    groups, atom, place = [0], 0, 0

    def add(cost: int) -> None:
        groups[-1] = min(groups[-1] + cost, _HUGE)

    while place < len(pattern):
        character = pattern[place]
        if simple := _SIMPLE.match(pattern, place):
            add(simple.end() - place)
            atom, place = 1, simple.end()
        elif character == "\\":
            atom, place = 1, place + 2
            add(1)
        elif character == "[" or (grammar and character in "\"'"):
            end = _closing(pattern, place, "]" if character == "[" else character)
            atom, place = (1 if character == "[" else end - place), end
            add(atom)
        elif character == "(":
            groups.append(0)
            place += 1
        elif character == ")" and len(groups) > 1:
            atom = groups.pop()
            add(atom)
            place += 1
        elif repeat := _REPEAT.match(pattern, place) or (grammar and _LARK_REPEAT.match(pattern, place)):
            times = max(map(_number, repeat.groups()))
            add(atom * max(times - 1, 0) + _repeat_cost(times))
            add(atom * times * times // _SQUARES if in_schema else 0)
            atom, place = min(atom * max(times, 1), _HUGE), repeat.end()
        elif grammar and (number := _NUMBER.match(pattern, place)):
            add(max(atom, 1) * _number(number[0]))
            place = number.end()
        else:
            add(1)
            atom, place = 1, place + 1
    return sum(groups)


def _closing(pattern: str, place: int, close: str) -> int:
    """Return the place behind the `close` of what opens at `place`."""
    place += 1
    while place < len(pattern) and pattern[place] != close:
        place += 2 if pattern[place] == "\\" else 1
    return place + 1


def _repeat_cost(times: int) -> int:
    return _REPEAT_COST * min(times, _REPEATS_THAT_COST) if times > 1 else 0


def _number(digits: str | None) -> int:
    return 0 if not digits else int(digits) if len(digits) < 9 else _HUGE


class _Schema:
    """Cost of a JSON schema, or of a structural tag, whose schemas and patterns count alike."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._lengths: set[tuple[str, int]] = set()
        self._joins: list[dict[str, Any]] = []  # with an `allOf`
        self._branches = 1  # of the largest `anyOf` or `oneOf`
        self._alternatives: dict[int, int] = {}  # by the id of a schema

    def check(self, form: str) -> None:
        cost = 0
        for part in self._costs(self._document, 0, names=False):
            cost += part
            _check_cost(form, cost)
        for join in self._joins:
            cost += self._combinations(join, 0)
            _check_cost(form, cost)

    def _combinations(self, schema: Any, depth: int) -> int:
        """Count the alternatives of a schema: all combinations of those that the members of an `allOf` have."""
        if not isinstance(schema, dict):
            return 1
        if depth > _MAX_NESTING:
            return _HUGE
        if id(schema) not in self._alternatives:
            self._alternatives[id(schema)] = 1  # where it comes back to itself
            count = 1
            for key in _BRANCHES:
                if isinstance(members := schema.get(key), list):
                    count *= max(sum(self._combinations(each, depth + 1) for each in members), 1)
            joined = schema.get("allOf")
            for each in joined if isinstance(joined, list) else ():
                count = min(count * self._combinations(each, depth + 1), _HUGE)
            own = dict(schema)
            if (reference := own.pop("$ref", None)) is not None:
                count *= self._combinations(self._referred(reference), depth + 1)
            # What is below combines with what other members have at the same place.
            self._alternatives[id(schema)] = min(count if count > 1 else self._most_branches(own), _HUGE)
        return self._alternatives[id(schema)]

    def _most_branches(self, node: Any) -> int:
        """Return the branches of the largest `anyOf` or `oneOf` in `node`; if it has references, in the document."""
        if isinstance(node, dict):
            if "$ref" in node:
                return self._branches
            own = [len(node[key]) for key in _BRANCHES if isinstance(node.get(key), list)]
            return max([1, *own, *map(self._most_branches, node.values())])
        return max([1, *map(self._most_branches, node)]) if isinstance(node, list) else 1

    def _referred(self, reference: Any) -> Any:
        """Return what a JSON pointer in the document refers to; the whole document for anything else."""
        node = self._document
        for part in unquote(str(reference)).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdecimal() and int(part[:9]) < len(node):
                node = node[int(part[:9])]
            else:
                return self._document
        return node

    def _costs(self, node: Any, depth: int, *, names: bool) -> Iterator[int]:
        if depth > _MAX_NESTING:
            raise ValueError(f"structured_outputs are nested more than {_MAX_NESTING} levels deep")
        if isinstance(node, dict):
            if not names and isinstance(node.get("allOf"), list):
                self._joins.append(node)
            for key, value in node.items():
                yield 1
                if names:
                    yield len(key)
                elif key in _IGNORED:
                    continue
                elif _COUNTS.fullmatch(key):
                    times = _times(value)
                    yield times
                    if key.endswith("Length") and (key, times) not in self._lengths:  # equal ones are compiled once
                        self._lengths.add((key, times))
                        yield _repeat_cost(times)
                    continue
                elif key in _PATTERNS and isinstance(value, str):
                    yield expanded_length(value, grammar=key == "grammar", in_schema=key == "pattern")
                    continue
                elif key in _BRANCHES and isinstance(value, list):
                    self._branches = max(self._branches, len(value))
                if not names and key == "patternProperties" and isinstance(value, dict):
                    yield sum(expanded_length(pattern, in_schema=True) for pattern in value)
                yield from self._costs(value, depth + 1, names=not names and key in _NAMED)
        elif isinstance(node, list):
            for value in node:
                yield 1
                yield from self._costs(value, depth + 1, names=False)
        elif isinstance(node, str):
            yield len(node)
        else:
            yield 1


def _document(form: str, given: str | dict[str, Any]) -> Any:
    """Return the parsed document of a form that may be text; text that is no JSON is left to vLLM's own refusal."""
    try:
        text = given if isinstance(given, str) else json.dumps(given)
    except RecursionError as error:
        raise ValueError(f"structured_outputs are nested more than {_MAX_NESTING} levels deep") from error
    _check_characters(form, len(text))
    encoded = text.encode("utf-8", "replace")
    _LIMITS.check(encoded)
    try:
        return load_json(encoded)
    except json.JSONDecodeError:
        return None


def _times(value: Any) -> int:
    try:
        return min(int(value), _HUGE)
    except (TypeError, ValueError, OverflowError):
        return 1


def _check_characters(form: str, characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise ValueError(
            f"structured_outputs: {form} has {characters} characters, at most {MAX_CHARACTERS} may be sent"
        )


def _check_cost(form: str, cost: int) -> None:
    if cost > MAX_COST:
        raise ValueError(
            f"structured_outputs: {form} is too large to be compiled: with all repeats written out (as of maxItems, "
            f"maxLength or {{n,m}}) it has more than {MAX_COST} characters; make it smaller"
        )
