"""What a grammar costs is known before anything compiles it."""

from __future__ import annotations

from typing import Any

import pytest

from shared.structured_outputs import check_structured_outputs, expanded_length

PROPERTIES = {f"property_{i}": {"type": "string", "description": "what it is, at length " * 20} for i in range(100)}
JOINED = {"allOf": [{"anyOf": [{}, {}, {}]}] * 4}
HONEST: list[dict[str, Any]] = [
    {"json_schema": {"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES)}},
    {"json_schema": {"type": "array", "items": {"type": "string", "maxLength": 200}, "maxItems": 100}},
    {"json_schema": {"properties": {f"p{i}": {"type": "string", "maxLength": 100} for i in range(60)}}},
    {"json_schema": '{"enum": ["yes", "no"]}'},
    {"json_schema": {"type": "string", "pattern": "^([a-z]+ ){1,200}[A-Z.]{1,500}$"}},
    {"json_schema": {"anyOf": [{"allOf": [{"$ref": "#/$defs/a"}]}] * 40, "$defs": {"a": {"type": "integer"}}}},
    {"json_schema": {"properties": {f"p{i}": JOINED for i in range(20)}}},
    {"json_schema": {"allOf": [JOINED, {"properties": {"x": {"anyOf": [{}] * 40}}}], "oneOf": [{"const": 1}] * 9}},
    {"json_schema": {"allOf": [{"$ref": "#/$defs/a"}] * 40, "$defs": {"a": {"properties": {"a": {"$ref": "#"}}}}}},
    {
        "json_schema": {
            "anyOf": [{}] * 90,
            "items": {"allOf": [{"$ref": "#/$defs/a"}] * 9},
            "$defs": {"a": {"const": 1}},
        }
    },
    {"json_schema": {"properties": {"anyOf": JOINED, "allOf": {"anyOf": [{}] * 100}}}},
    {"regex": r"\d{4}-\d{2}-\d{2}( [A-Z][a-z]{1,20}){1,5}"},
    {"choice": [f"label number {i}" for i in range(1000)]},
    {"grammar": 'root ::= "a"{1,100} | [0-9]+ rule12\nrule12 ::= "x"'},
    {"structural_tag": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {}}}},
]


@pytest.mark.parametrize("forms", HONEST)
def test_formats_that_people_use(forms: dict[str, Any]) -> None:
    check_structured_outputs(**forms)


def _nested(depth: int) -> dict[str, Any]:
    return {"items": _nested(depth - 1)} if depth else {}


def _doubled(levels: int) -> dict[str, Any]:
    """Each refers to the next one twice, so that there are 2 to the power of 2**levels combinations."""
    ends = {f"d{levels}": {"anyOf": [{"const": 1}, {"const": 2}]}}
    return ends | {f"d{i}": {"allOf": [{"$ref": f"#/%24defs/d{i + 1}"}] * 2} for i in range(levels)}


@pytest.mark.parametrize(
    "forms",
    [
        {"json_schema": {"properties": {f"property_{i}": {"type": "string"} for i in range(20000)}}},
        {"json_schema": {"$defs": {f"d{i}": {"properties": {"a" * 50: {}}} for i in range(2000)}}},
        {"json_schema": {"enum": ["x" * 100] * 1000}},
        {"json_schema": {"type": "array", "minItems": 10**6}},
        {"json_schema": {"type": "string", "maxLength": 1e300}},
        {"json_schema": {"type": "string", "maxLength": 10**400}},
        {"json_schema": {"properties": {f"p{i}": {"type": "string", "maxLength": 100 + i} for i in range(60)}}},
        {"json_schema": {"type": "string", "pattern": "(a{1000}){1000}"}},
        {"json_schema": {"type": "string", "pattern": "^(ab|cd){2000}$"}},
        {"json_schema": {"patternProperties": {"a{100000}": {}}}},
        {"json_schema": {"allOf": [{"anyOf": [{}, {}, {}]}] * 20}},
        {"json_schema": {"items": {"anyOf": [{}] * 300, "allOf": [{"anyOf": [{}] * 300}]}}},
        {"json_schema": {"allOf": [{"properties": {"x": {"anyOf": [{}] * 40}}}] * 4}},
        {"json_schema": {"allOf": [{"$ref": "#/$defs/a"}] * 12, "$defs": {"a": {"anyOf": [{}] * 4}}}},
        {"json_schema": {"properties": {f"p{i}": {"allOf": [{"anyOf": [{}] * 20}] * 3} for i in range(8)}}},
        {"json_schema": {"$ref": "#/$defs/d0", "$defs": _doubled(5)}},
        {"structural_tag": {"structures": [{"schema": {"allOf": [{"oneOf": [{}, {}, {}]}] * 20}}]}},
        {"json_schema": _nested(500)},
        {"json_schema": "[" * 100000},
        {"json_schema": " " * 2**19},
        {"regex": "a{1,100000}"},
        {"regex": "((a{50}){50}){50}"},
        {"regex": "[a-z]{1,60}" * 60},
        {"regex": "a" * 2**19},
        {"regex": "a{" + "9" * 5000 + "}"},
        {"choice": ["x" * 1000] * 1000},
        {"grammar": 'root ::= "a"{100000}'},
        {"grammar": "start: WORD\nWORD: /a/ ~ 1..100000"},
        {"grammar": 'start: %json {"type": "array", "maxItems": 100000}'},
        {"structural_tag": {"format": {"type": "regex", "pattern": "a{100000}"}}},
        {"structural_tag": {"format": {"type": "grammar", "grammar": 'root ::= "a"{100000}'}}},
        {"structural_tag": {"structures": [{"schema": {"properties": {f"p{i}": {} for i in range(20000)}}}]}},
    ],
)
def test_formats_that_would_be_compiled_for_minutes(forms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs|JSON"):
        check_structured_outputs(**forms)


@pytest.mark.parametrize(
    ("pattern", "least"),
    [("abc", 3), ("(ab){3}", 6), ("[^]]a]{2}", 3), (r"\\{5}", 1), ("((a{2}){3}){4}", 24), ("a{2,}", 2), ("a{", 2)],
)
def test_repeats_are_written_out(pattern: str, least: int) -> None:
    assert least <= expanded_length(pattern) <= least + 1000
