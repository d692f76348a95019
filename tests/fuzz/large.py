"""Bodies that are small for a network and large for a parser: long lists, deep nesting, long strings, long numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from rollout_server.settings import ServerSettings
from tests.fuzz.campaign import Target, every
from tests.fuzz.routes import BODIES, JSON

#: A body is a template with one of these in place of a value.
_HERE = "a value goes here"
_SAMPLED = [
    "n",
    "top_k",
    "seed",
    "max_tokens",
    "min_tokens",
    "temperature",
    "stop",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "logit_bias",
    "structured_outputs",
]
#: Route -> places for a value, as documents that hold `_HERE`.
_PLACES: dict[str, dict[str, Any]] = {
    "/v1/generate": {
        "the body": _HERE,
        "prompts": {"prompts": _HERE, "sampling": {"max_tokens": 1}},
        "token_ids": {"prompts": [{"token_ids": _HERE}]},
        "text": {"prompts": [{"text": _HERE}]},
        "messages": {"prompts": [{"messages": _HERE}]},
        "a message's content": {"prompts": [{"messages": [{"role": "user", "content": _HERE}]}]},
        "a message's tool calls": {"prompts": [{"messages": [{"role": "user", "content": "a", "tool_calls": _HERE}]}]},
        "a message's role": {"prompts": [{"messages": [{"role": _HERE, "content": "a"}]}]},
        "chat_template_kwargs": {"prompts": [{"text": "a"}], "chat_template_kwargs": {"documents": _HERE}},
        "run_id": {"prompts": [{"text": "a"}], "run_id": _HERE},
        "policy": {"prompts": [{"text": "a"}], "policy": _HERE},
        "policy.step": {"prompts": [{"text": "a"}], "policy": {"run_id": "fuzzed", "step": _HERE}},
        "min_step": {"prompts": [{"text": "a"}], "min_step": _HERE, "run_id": "fuzzed"},
        "an unknown field": {"prompts": [{"text": "a"}], "unknown": _HERE},
        **{
            f"sampling.{name}": {"prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 2, name: _HERE}}
            for name in _SAMPLED
        },
        "a schema": {"prompts": [{"token_ids": [5]}], "sampling": {"structured_outputs": {"json": _HERE}}},
        "choice": {"prompts": [{"token_ids": [5]}], "sampling": {"structured_outputs": {"choice": _HERE}}},
    },
    "/v1/score": {
        "sequences": {"sequences": _HERE, "policy": "base"},
        "a sequence": {"sequences": [_HERE], "policy": "base"},
        "min_step": {"sequences": [[5, 6]], "run_id": "fuzzed", "min_step": _HERE},
    },
    "/v1/completions": {
        "prompt": {"model": "base", "prompt": _HERE, "max_tokens": 2},
        "model": {"model": _HERE, "prompt": "a", "max_tokens": 2},
        "stop": {"model": "base", "prompt": "a", "max_tokens": 2, "stop": _HERE},
        "logit_bias": {"model": "base", "prompt": "a", "max_tokens": 2, "logit_bias": _HERE},
        "an unknown field": {"model": "base", "prompt": "a", "max_tokens": 2, "unknown": _HERE},
    },
    "/v1/chat/completions": {
        "messages": {"model": "base", "messages": _HERE, "max_tokens": 2},
        "content": {"model": "base", "messages": [{"role": "user", "content": _HERE}], "max_tokens": 2},
        "tools": {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tools": _HERE},
        "chat_template_kwargs": {
            "model": "base",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "chat_template_kwargs": {"documents": _HERE},
        },
    },
    "/v1/responses": {"input": {"model": "base", "input": _HERE, "max_output_tokens": 16}},
    "/v1/messages": {
        "messages": {"model": "base", "messages": _HERE, "max_tokens": 2},
        "system": {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "system": _HERE},
    },
    "/tokenize": {
        "prompt": {"model": "base", "prompt": _HERE},
        "messages": {"model": "base", "messages": _HERE},
        "content": {"model": "base", "messages": [{"role": "user", "content": _HERE}]},
    },
    "/detokenize": {"tokens": {"model": "base", "tokens": _HERE}},
}


def _listed(item: bytes) -> Callable[[int], bytes]:
    return lambda size: b"[" + (item + b",") * (size // (len(item) + 1)) + item + b"]"


def _quoted(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: b'"' + unit * (size // len(unit)) + b'"'


def _keyed(entry: bytes) -> Callable[[int], bytes]:
    """Return a maker of objects whose keys are numbers."""

    def make(size: int) -> bytes:
        return b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(size // (len(entry) + 9))) + b"}"

    return make


#: Kind of a value -> its JSON of about so many bytes.
_VALUES: dict[str, Callable[[int], bytes]] = {
    "small numbers": _listed(b"5"),
    "long numbers": _listed(b"9" * 400),
    "fractions": _listed(b"0.5"),
    "empty lists": _listed(b"[]"),
    "pairs": _listed(b"[5,6]"),
    "empty objects": _listed(b"{}"),
    "nulls": _listed(b"null"),
    "small texts": _listed(b'"a"'),
    "prompts of a token": _listed(b'{"token_ids":[5]}'),
    "prompts of a word": _listed(b'{"text":"a"}'),
    "prompts of a message": _listed(b'{"messages":[{"role":"user","content":"a"}]}'),
    "messages": _listed(b'{"role":"user","content":"a"}'),
    "parts of messages": _listed(b'{"type":"text","text":"a"}'),
    "tools": _listed(b'{"type":"function","function":{"name":"f","parameters":{}}}'),
    "many keys": _keyed(b"1"),
    "many objects": _keyed(b"{}"),
    "the same key": lambda size: b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
    "a nested list": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "a nested object": lambda size: b'{"a":' * (size // 6) + b"1" + b"}" * (size // 6),
    "a list nested a little": lambda size: _listed(b"[" * 100 + b"]" * 100)(size),
    "a long text": _quoted(b"a"),
    "a text of words": _quoted(b"a "),
    "a text of blanks": _quoted(b" "),
    "a text of many languages": _quoted("é\u4e2d\U0001d4b3".encode()),
    "a text of escapes": _quoted(b"\\u0000"),
    "a text of special tokens": _quoted(b"<|im_end|>"),
    "a long number": lambda size: b"9" * size,
    "a long negative number": lambda size: b"-" + b"9" * size,
    "a long fraction": lambda size: b"0." + b"9" * size,
    "a large exponent": lambda size: b"1e" + b"9" * size,
    "a number of 4,000 digits": lambda size: b"9" * 4000,
    "a number of 400 digits": lambda size: b"9" * 400,
    "a number of 20 digits": lambda size: b"9" * 20,
}
#: Sent in every campaign, as large as a body may be: what takes most work for its bytes.
_WORST = [
    ("/v1/generate", "the body", "a nested list"),
    ("/v1/generate", "prompts", "prompts of a token"),
    ("/v1/generate", "prompts", "prompts of a word"),
    ("/v1/generate", "prompts", "prompts of a message"),
    ("/v1/generate", "prompts", "empty objects"),
    ("/v1/generate", "token_ids", "small numbers"),
    ("/v1/generate", "token_ids", "nulls"),
    ("/v1/generate", "text", "a text of words"),
    ("/v1/generate", "text", "a text of many languages"),
    ("/v1/generate", "messages", "messages"),
    ("/v1/generate", "messages", "empty objects"),
    ("/v1/generate", "a message's content", "a text of words"),
    ("/v1/generate", "a message's tool calls", "empty lists"),
    ("/v1/generate", "chat_template_kwargs", "empty objects"),
    ("/v1/generate", "an unknown field", "empty lists"),
    ("/v1/generate", "sampling.stop", "small texts"),
    ("/v1/generate", "sampling.stop_token_ids", "small numbers"),
    ("/v1/generate", "sampling.bad_words", "small texts"),
    ("/v1/generate", "sampling.allowed_token_ids", "small numbers"),
    ("/v1/generate", "sampling.logit_bias", "many keys"),
    ("/v1/generate", "sampling.seed", "a long number"),
    ("/v1/generate", "a schema", "a nested object"),
    ("/v1/generate", "choice", "small texts"),
    ("/v1/score", "sequences", "pairs"),
    ("/v1/score", "sequences", "empty lists"),
    ("/v1/score", "a sequence", "small numbers"),
    ("/v1/completions", "prompt", "small texts"),
    ("/v1/completions", "prompt", "small numbers"),
    ("/v1/completions", "prompt", "pairs"),
    ("/v1/completions", "prompt", "a text of words"),
    ("/v1/completions", "stop", "small texts"),
    ("/v1/completions", "logit_bias", "many keys"),
    ("/v1/completions", "an unknown field", "empty lists"),
    ("/v1/chat/completions", "messages", "messages"),
    ("/v1/chat/completions", "content", "parts of messages"),
    ("/v1/chat/completions", "content", "a text of words"),
    ("/v1/chat/completions", "tools", "tools"),
    ("/v1/responses", "input", "messages"),
    ("/v1/responses", "input", "a text of words"),
    ("/v1/messages", "messages", "messages"),
    ("/tokenize", "prompt", "a text of words"),
    ("/tokenize", "prompt", "a text of many languages"),
    ("/tokenize", "messages", "messages"),
    ("/detokenize", "tokens", "small numbers"),
]
_ALL = [(route, place) for route, places in _PLACES.items() for place in places]


def body_of(route: str, place: str, value: str, size: int) -> bytes:
    """Return a body of about `size` bytes, with a value of that kind at that place."""
    before, after = json.dumps(_PLACES[route][place]).encode().split(json.dumps(_HERE).encode())
    return before + _VALUES[value](size) + after


def worst_bodies(size: int) -> list[tuple[str, str, bytes]]:
    """Return route, description and body of those that take most work for their bytes."""
    return [(route, f"{place}: {value}", body_of(route, place, value, size)) for route, place, value in _WORST]


def fuzz_large(target: Target, examples: int, number: int) -> None:
    """Send large bodies, each of the worst as large as the server takes them, and long numbers in every field."""

    def send(drawn: tuple[str, str, str, int]) -> None:
        route, place, value, size = drawn
        what = f"{place}: {value}, {size} bytes"
        target.send("large", "POST", route, what=what, content=body_of(route, place, value, size), headers=JSON)

    largest = ServerSettings().max_body_mib * 2**20 - 2000
    for route, place, value in _WORST:
        send((route, place, value, largest))
    for route, (body, optional) in BODIES.items():
        for name, digits in ((name, digits) for name in _integers(body, optional) for digits in (20, 400, 4000)):
            content = _with_number(body, name, digits)
            target.send("large", "POST", route, what=f"{name} of {digits} digits", content=content, headers=JSON)
    for digits in (18, 19, 20, 400, 4000):
        headers = JSON | {"Lockstep-Policy": f"fuzzed@0.{'9' * digits}"}
        body = json.dumps({"model": "policy:fuzzed", "prompt": "a", "max_tokens": 2}).encode()
        target.send("large", "POST", "/v1/completions", what=f"a version of {digits}", content=body, headers=headers)
        target.send("large", "GET", f"/v1/state?min_step={'9' * digits}", what=f"a query of {digits} digits")
    # In between, servers rightly work on what they accept for a long time.
    sizes = st.one_of(st.integers(100, 2000), st.integers(2**20, 2**21))
    values = st.sampled_from(list(_VALUES))
    drawn = st.tuples(st.sampled_from(_ALL), values, sizes).map(lambda draw: (*draw[0], *draw[1:]))
    every(drawn, examples, number, send)
    target.expect_unchanged("large bodies")


def _integers(body: dict[str, Any], optional: dict[str, Any]) -> list[str]:
    """Return the names ("a.b": b in a) of fields that hold an integer, or a list of some."""
    inner = [
        (f"{outer}.{name}", value)
        for outer in body
        if isinstance(body[outer], dict)
        for name, value in body[outer].items()
    ]
    fields = {**body, **optional, **dict(inner)}

    def is_integer(value: Any) -> bool:
        return type(value) is int or (isinstance(value, list) and bool(value) and type(value[0]) is int)

    names = [name for name, value in fields.items() if is_integer(value)]
    return [*names, "min_step", "wait_s"] if "run_id" in body else names


def _with_number(body: dict[str, Any], name: str, digits: int) -> bytes:
    """Return the body with a long number in the field, alone and in place of a list's element."""
    place, _, field = name.rpartition(".")
    document = json.loads(json.dumps(body))
    inner = document.setdefault(place, {}) if place else document
    is_list = isinstance(inner.get(field), list)
    inner[field] = [_HERE] if is_list else _HERE
    return json.dumps(document).encode().replace(json.dumps(_HERE).encode(), b"9" * digits)
