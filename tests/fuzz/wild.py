"""Values that break parsers, and JSON bodies with a few of them."""

from __future__ import annotations

import copy
import math
from typing import Any

from hypothesis import strategies as st

_INTEGERS = [-(2**63) - 1, -(2**31), -1, 0, 1, 2, 255, 511, 512, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30]
_INTEGERS += [10**400, -(10**400), 10**4200]  # longer ones cannot be written: Python's limit is 4,300 digits
_FLOATS = [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 1e-30, -0.0, 0.5, 1.0000001]
_TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "a\udfffb",
    "\u202e",
    "\U0001d4b3" * 40,
    "x" * 3000,
    "../../etc/passwd",
    "/proc/self/m",
    "{{ 7 * 7 }}",
    "{% for i in range(9) %}x{% endfor %}",
    "%s%n",
    "NaN",
    "1e999",
    "true",
    "null",
    "policy",
    "base",
    "policy:",
    "policy:fuzzed",
    "slot-1",
    "<|im_end|>",
    "\r\n\r\nHTTP/1.1 200 OK",
    "A" * 70,
    "ﷺ" * 20,
]
#: Grammars, schemas and patterns that are invalid, empty, recursive or large.
_FORMS = [
    {"regex": "(a|a)*b"},
    {"regex": "(((("},
    {"regex": "[0-9]{1,40}"},
    {"regex": "(?=x)"},
    {"regex": "\\p{Zz}"},
    {"json": "{"},
    {"json": {"$ref": "#"}},
    {"json": {"type": "nothing"}},
    {"json": {"type": "string", "pattern": "("}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"json": {"type": "array", "minItems": -3}},
    {"grammar": "root ::= root"},
    {"grammar": "root ::="},
    {"grammar": 'root ::= "a" | missing'},
    {"grammar": "\x00"},
    {"choice": []},
    {"choice": [""]},
    {"choice": ["a", "a"]},
    {"json_object": False},
    {"json_object": True},
]


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


wild_numbers = st.one_of(st.sampled_from(_INTEGERS), st.sampled_from(_FLOATS), st.integers(), st.floats())
wild_texts = st.one_of(st.sampled_from(_TEXTS), st.text(max_size=20))
_scalars = st.one_of(st.none(), st.booleans(), wild_numbers, wild_texts)
wild_values = st.one_of(
    _scalars,
    st.lists(_scalars, max_size=4),
    st.dictionaries(wild_texts, _scalars, max_size=3),
    st.sampled_from([{}, [], [[]], [{}], {"": {}}, _nested(60)]),
    st.sampled_from(_FORMS),
).map(copy.deepcopy)  # drawn values are modified later


@st.composite
def changed(draw: st.DrawFn, right: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """Draw `right` with some `optional` fields ("a.b": b in a) and up to three changes."""
    body = copy.deepcopy(right)
    for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=3, unique=True)) if optional else ():
        place, _, field = name.rpartition(".")
        (body[place] if place else body)[field] = copy.deepcopy(optional[name])
    for _ in range(draw(st.integers(0, 3))):
        where, key = draw(st.sampled_from(list(_places(body))))
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            where[key] = draw(wild_values)
        elif action == "remove":
            del where[key]
        elif isinstance(where, dict):
            where[draw(wild_texts)] = draw(wild_values)
        else:
            where.append(draw(wild_values))
        if not body:
            break
    return body


def _places(value: Any) -> Any:
    """Yield (container, key) of every value in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries)[:50]:
        yield value, key
        yield from _places(inner)
