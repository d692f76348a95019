"""JSON is bounded before objects are made of it."""

from __future__ import annotations

import json

import pytest

from shared.bounded_json import JsonLimits, load_json

LIMITS = JsonLimits(values=1000, strings=1000, containers=400)
FEW = rb'{"prompts":[{"text":"a, b [ { \" ]"},{"token_ids":[1,2]}]}'


def test_what_is_within_the_limits_is_read_as_python_reads_it() -> None:
    for document in (FEW, b"[]", b"{}", b" [1, [2, {}], null] ", b'"text"', b"7", b'{"a":{"b":[1.5,-2e3,true]}}'):
        assert LIMITS.check(document) >= len(document)
        assert load_json(document) == json.loads(document)


@pytest.mark.parametrize(
    ("document", "what"),
    [
        (b"[" + b"1," * 1000 + b"1]", "values"),
        (b"[" + b'"",' * 1000 + b'""]', "strings"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(1000)) + b"}", "strings"),
        (b"[" + b"[]," * 400 + b"[]]", "objects and lists"),
        (b"[" + b'{"":0},' * 400 + b"{}]", "objects and lists"),
        (b"[" * 101 + b"]" * 101, "nested"),
        (rb'["\\"]' + b"[" * 101, "nested"),  # behind a string that does not end where it seems to
        (json.dumps([[]] * 500).encode("utf-16"), "UTF-8"),
        (json.dumps([[]] * 500).encode("utf-32-le"), "UTF-8"),
    ],
)
def test_shapes_that_would_cost_more_than_they_may(document: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        LIMITS.check(document)


def test_what_is_within_strings_is_no_shape() -> None:
    text = '[{"' * 500 + ", " * 5000 + "\\"
    document = json.dumps([text, {"text": text}]).encode()
    LIMITS.check(document)
    assert load_json(document) == [text, {"text": text}]


@pytest.mark.parametrize("broken", [b"{", b"[1,", b'"', b"[1]]", b"\xff\xfe", b"9" * 5000, b"[" * 90, b""])
def test_what_cannot_be_read_is_one_kind_of_error(broken: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        load_json(broken)


def test_a_list_that_one_call_would_read_is_short() -> None:
    limits = JsonLimits(values=2**23, strings=2**20, containers=2**19)
    with pytest.raises(ValueError, match="values in one list"):
        limits.check(b'{"prompts":[{"token_ids":[' + b"0," * 2**21 + b"0]}]}")
    with pytest.raises(ValueError, match="strings in one list"):
        limits.check(b"{" + b",".join(b'"%d":0' % i for i in range(2**18)) + b"}")
    limits.check(json.dumps(["a, b" * 2**20]).encode())


def test_the_sizes_of_a_large_training_are_taken() -> None:
    row = list(range(100000, 108192))
    limits = JsonLimits(values=5 * 2**20, strings=2**20, containers=2**19)
    document = json.dumps({"prompts": [{"token_ids": row}] * 64, "sampling": {"n": 64}}, separators=(",", ":")).encode()
    assert limits.check(document) * 8 < 2**30
