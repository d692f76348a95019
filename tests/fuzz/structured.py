"""Structured outputs that are large, or take a compiler long: schemas, patterns, choices and grammars of every form."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.campaign import Target, every, json_bytes
from tests.fuzz.routes import JSON

#: Seconds in which a server must have answered an ordinary structured request after any other.
HONEST_S = 5.0
_MESSAGES = [{"role": "user", "content": "the fox"}]


def _object(count: int, of: Any = None) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": of or {"type": "string"} for i in range(count)}}


def _nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = {"type": "integer"}
    for _ in range(min(depth, 300)):  # Python's encoder nests no deeper; `tests.fuzz.large` does
        value = wrap(value)
    return value


def _doubling(count: int) -> dict[str, Any]:
    """Return a schema of `count` definitions that stands for 2^count objects."""
    names = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$defs": {**names, f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


#: Kind of a JSON schema -> the schema of a size.
_SCHEMAS: dict[str, Callable[[int], Any]] = {
    "properties": _object,
    "required properties": lambda size: {**_object(size), "required": [f"p{i}" for i in range(size)]},
    "properties of any order": lambda size: {**_object(size), "additionalProperties": True},
    "objects in properties": lambda size: _object(int(size**0.5), _object(int(size**0.5))),
    "a property's name": lambda size: {"type": "object", "properties": {"a" * size: {"type": "string"}}},
    "enum": lambda size: {"enum": [f"value {i}" for i in range(size)]},
    "enum of numbers": lambda size: {"enum": list(range(size))},
    "const": lambda size: {"const": "a" * size},
    "anyOf": lambda size: {"anyOf": [{"const": i} for i in range(size)]},
    "anyOf objects": lambda size: {"anyOf": [_object(3) for _ in range(size)]},
    "allOf": lambda size: {"allOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(size)]},
    "oneOf": lambda size: {"oneOf": [{"const": f"c{i}"} for i in range(size)]},
    "nested arrays": lambda size: _nested(size, lambda inner: {"type": "array", "items": inner}),
    "nested objects": lambda size: _nested(size, lambda inner: {"type": "object", "properties": {"a": inner}}),
    "nested anyOf": lambda size: _nested(size, lambda inner: {"anyOf": [inner, {"type": "null"}]}),
    "definitions": lambda size: {"$defs": {f"d{i}": _object(1) for i in range(size)}, "$ref": "#/$defs/d0"},
    "a chain of definitions": lambda size: {
        "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(size)}, f"d{size}": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
    "definitions that double": lambda size: _doubling(min(size, 200)),
    "a recursion": lambda size: {"type": "array", "items": {"$ref": "#"}, "minItems": size},
    "minItems": lambda size: {"type": "array", "items": {"type": "integer"}, "minItems": size},
    "maxItems": lambda size: {"type": "array", "items": _object(3), "maxItems": size},
    "prefixItems": lambda size: {"type": "array", "prefixItems": [{"type": "integer"}] * size},
    "minLength": lambda size: {"type": "string", "minLength": size, "maxLength": 2 * size},
    "maxLength": lambda size: {"type": "string", "maxLength": size},
    "a pattern": lambda size: {"type": "string", "pattern": f"^(a|b){{1,{size}}}$"},
    "a long pattern": lambda size: {"type": "string", "pattern": "|".join(f"a{i}" for i in range(size))},
    "patternProperties": lambda size: {"type": "object", "patternProperties": {f"^a{i}": {} for i in range(size)}},
    "a range": lambda size: {"type": "integer", "minimum": 0, "maximum": 10 ** min(size, 300)},
    "minProperties": lambda size: {"type": "object", "minProperties": size},
    "dependentSchemas": lambda size: {"type": "object", "dependentSchemas": {f"p{i}": _object(1) for i in range(size)}},
    "a title": lambda size: {"type": "integer", "title": "a" * size},
    "unknown keywords": lambda size: {"type": "integer", **{f"x-{i}": i for i in range(size)}},
}
#: Kind of a regular expression -> the expression of a size.
_PATTERNS: dict[str, Callable[[int], str]] = {
    "counted": lambda size: f"a{{1,{size}}}",
    "counted twice": lambda size: f"((a|b){{1,{size}}}){{1,{size}}}",
    "counted three times": lambda size: f"(((a|b|c){{1,{size}}}){{1,{size}}}){{1,{size}}}",
    "any counted": lambda size: f".{{{size}}}",
    "alternatives": lambda size: "|".join(f"word{i}" for i in range(size)),
    "nested groups": lambda size: "(" * size + "a" + ")" * size,
    "nested stars": lambda size: "(" * size + "a" + ")*" * size,
    "classes": lambda size: "[a-zA-Z0-9_]?" * size,
    "optional": lambda size: "a?" * size + "a" * size,
    "a suffix that doubles states": lambda size: f"[ab]*a[ab]{{{size}}}",
    "letters": lambda size: "a" * size,
    "all of Unicode": lambda size: "[\\u0000-\\U0010ffff]" * size,
}
#: Kind of a grammar -> the grammar of a size.
_GRAMMARS: dict[str, Callable[[int], str]] = {
    "rules": lambda size: (
        "root ::= r0\n" + "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(size)) + f'r{size} ::= "b"'
    ),
    "alternatives": lambda size: "root ::= " + " | ".join(f'"word{i}"' for i in range(size)),
    "rules that double": lambda size: (
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(size)) + f'r{size} ::= "b"'
    ),
    "left recursion": lambda size: (
        'root ::= root "a" | "b"\n' + "".join(f'r{i} ::= r{i} "a" | "b"\n' for i in range(size))
    ),
    "ambiguous": lambda size: 'root ::= root root | "a" | ""' + " | root root" * size,
    "nested groups": lambda size: "root ::= " + "(" * size + '"a"' + ")" * size,
    "counted": lambda size: f'root ::= "a"{{1,{size}}}',
    "counted twice": lambda size: f'root ::= (("a" | "b"){{1,{size}}}){{1,{size}}}',
    "a text": lambda size: f'root ::= "{"a" * size}"',
    "a comment": lambda size: 'root ::= "a" #' + "a" * size,
    "Lark's": lambda size: "start: " + " | ".join(f'"word{i}"' for i in range(size)),
}
_CHOICES: dict[str, Callable[[int], list[str]]] = {
    "words": lambda size: [f"word{i}" for i in range(size)],
    "a text": lambda size: ["a" * size],
    "texts": lambda size: [f"{i}" + "a" * size for i in range(20)],
    "the same": lambda size: ["a"] * size,
    "prefixes": lambda size: ["a" * i for i in range(1, min(size, 2000))],
}
_Form = tuple[str, str]  # a field of structured outputs, and a kind
FORMS: list[_Form] = [
    *(("json", kind) for kind in _SCHEMAS),
    *(("json as text", kind) for kind in _SCHEMAS),
    *(("regex", kind) for kind in _PATTERNS),
    *(("grammar", kind) for kind in _GRAMMARS),
    *(("choice", kind) for kind in _CHOICES),
    *(("structural_tag", kind) for kind in _SCHEMAS),
]
#: Sizes that no honest request has, and some that one could.
LARGE = 20_000
_SIZES = [3, 30, 300, 3000, LARGE]


def constraint(form: _Form, size: int) -> dict[str, Any]:
    """Return structured outputs of that form and size, as vLLM's field of that name takes them."""
    field, kind = form
    if field == "regex":
        return {"regex": _PATTERNS[kind](size)}
    if field == "grammar":
        return {"grammar": _GRAMMARS[kind](size)}
    if field == "choice":
        return {"choice": _CHOICES[kind](size)}
    schema = _SCHEMAS[kind](size)
    if field == "structural_tag":
        tag = {"begin": "<a>", "schema": schema, "end": "</a>"}
        return {"structural_tag": json.dumps({"type": "structural_tag", "structures": [tag], "triggers": ["<a>"]})}
    return {"json": schema if field == "json" else json.dumps(schema)}


def request(route: str, constraint: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request under a constraint; `route` is one of `ROUTES`."""
    schema = constraint.get("json", {"type": "object", "x": constraint})
    schema = json.loads(schema) if isinstance(schema, str) else schema
    chat = {"model": "base", "messages": _MESSAGES, "max_tokens": 2}
    function = {"name": "f", "parameters": schema}
    return {
        "/v1/generate": lambda: (
            "/v1/generate",
            {
                "prompts": [{"token_ids": [5]}],
                "policy": "base",
                "sampling": {"max_tokens": 2, "structured_outputs": constraint},
            },
        ),
        "completions": lambda: (
            "/v1/completions",
            {"model": "base", "prompt": "a", "max_tokens": 2, "structured_outputs": constraint},
        ),
        "completions, response_format": lambda: (
            "/v1/completions",
            {"model": "base", "prompt": "a", "max_tokens": 2, "response_format": _response_format(constraint, schema)},
        ),
        "chat": lambda: ("/v1/chat/completions", {**chat, "structured_outputs": constraint}),
        "chat, response_format": lambda: (
            "/v1/chat/completions",
            {**chat, "response_format": _response_format(constraint, schema)},
        ),
        "chat, tools": lambda: (
            "/v1/chat/completions",
            {**chat, "tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        ),
        "chat, a tool": lambda: (
            "/v1/chat/completions",
            {
                **chat,
                "tools": [{"type": "function", "function": function}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
        ),
        "responses": lambda: (
            "/v1/responses",
            {
                "model": "base",
                "input": "a",
                "max_output_tokens": 16,
                "text": {"format": {"type": "json_schema", "name": "a", "schema": schema}},
            },
        ),
        "responses, tools": lambda: (
            "/v1/responses",
            {
                "model": "base",
                "input": "a",
                "max_output_tokens": 16,
                "tools": [{"type": "function", "name": "f", "parameters": schema}],
                "tool_choice": "required",
            },
        ),
        "messages, tools": lambda: (
            "/v1/messages",
            {**chat, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
        ),
    }[route]()


#: Ways to state a constraint.
ROUTES = [
    "/v1/generate",
    "completions",
    "completions, response_format",
    "chat",
    "chat, response_format",
    "chat, tools",
    "chat, a tool",
    "responses",
    "responses, tools",
    "messages, tools",
]


def _response_format(constraint: dict[str, Any], schema: Any) -> dict[str, Any]:
    if "structural_tag" in constraint:
        return dict(json.loads(constraint["structural_tag"]))
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def fuzz_structured(target: Target, examples: int, number: int) -> None:
    """Send structured outputs of every form; after each, one of an honest client must be answered at once."""
    words = itertools.count()

    def send(drawn: tuple[str, _Form, int]) -> None:
        route, form, size = drawn
        path, body = request(route, constraint(form, size))
        what = f"{route}: {form[0]}, {form[1]}, {size}"
        target.send("structured", "POST", path, what=what, content=json_bytes(body), headers=JSON)
        honest(target, what, f"word {next(words)} of {number}")

    for form in FORMS:
        send(("/v1/generate" if form[0] != "structural_tag" else "chat", form, LARGE))
    for route in ROUTES:
        send((route, ("json", "properties"), LARGE))
    every(st.tuples(st.sampled_from(ROUTES), st.sampled_from(FORMS), st.sampled_from(_SIZES)), examples, number, send)
    target.expect_unchanged("structured outputs")


def honest(target: Target, after: str, word: str) -> None:
    """Send a small structured request that no cache knows, and check that it is answered in time."""
    body = {
        "prompts": [{"token_ids": [5]}],
        "policy": "base",
        "sampling": {"max_tokens": 4, "structured_outputs": {"choice": [word, "another"]}},
    }
    started = time.monotonic()
    answer = target.send("structured", "POST", "/v1/generate", what=f"an honest one after {after}", json=body)
    seconds = time.monotonic() - started
    if answer is not None and (answer.status_code != 200 or seconds > HONEST_S):
        target.tally.fail(f"structured: an honest request gets {answer.status_code} in {seconds:.1f} s after {after}")
