"""Requests to each route: almost valid JSON, almost valid adapters, and raw bytes."""

from __future__ import annotations

import copy
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

from tests.fuzz.blobs import blobs, is_right, put_together, take_apart
from tests.fuzz.campaign import Target, every, json_bytes, pieces
from tests.fuzz.wild import changed, wild_texts, wild_values
from tests.integration.support import policy as P

JSON = {"content-type": "application/json"}
_SAMPLING = {
    "n": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "seed": 5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "stop": ["a"],
    "stop_token_ids": [9],
    "ignore_eos": True,
    "bad_words": ["the"],
    "allowed_token_ids": [5, 6, 7],
    "logit_bias": {"5": 1.0},
    "structured_outputs": {"regex": "[a-z]{1,3}"},
    "include_stop_str_in_output": False,
}
_MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
_OPENAI = _SAMPLING | {
    "temperature": 1.0,
    "logprobs": 2,
    "echo": True,
    "return_token_ids": True,
    "prompt_logprobs": 1,
    "stream": True,
    "cache_salt": "x",
    "stream_options": {"include_usage": True},
    "truncate_prompt_tokens": 3,
    "priority": 0,
    "request_id": "r",
    "return_tokens_as_token_ids": True,
    "suffix": None,
    "user": "u",
    "response_format": {"type": "json_object"},
    "kv_transfer_params": {},
    "vllm_xargs": {"a": 1},
    "add_special_tokens": False,
    "logits_processors": ["os.system"],
    "prompt_embeds": "AAAA",
    "data_parallel_rank": 0,
    "repetition_detection": {},
}
_CHAT = _OPENAI | {
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "auto",
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"a": 1},
    "documents": [{}],
    "continue_final_message": True,
    "add_generation_prompt": False,
    "max_completion_tokens": 3,
    "mm_processor_kwargs": {},
    "reasoning_effort": "low",
    "parallel_tool_calls": True,
}
#: Route -> a valid body, and optional fields.
BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/generate": (
        {"prompts": [{"token_ids": [5, 6, 7]}, {"text": "the fox"}], "run_id": "fuzzed", "sampling": {"max_tokens": 2}},
        {
            **{f"sampling.{name}": value for name, value in _SAMPLING.items()},
            "policy": "base",
            "min_step": 0,
            "wait_s": 0.01,
            "return_text": True,
            "stream": True,
            "skip_special_tokens": False,
            "chat_template_kwargs": {"tokenize": False, "enable_thinking": True},
            "prompts": [{"messages": _MESSAGES, "seed": 4}],
        },
    ),
    "/v1/score": (
        {"sequences": [[5, 6, 7], [8, 9]], "run_id": "fuzzed"},
        {"policy": {"run_id": "fuzzed", "fence": 0, "step": 0}, "min_step": 0, "wait_s": 0.01},
    ),
    "/v1/sessions": (
        {"run_id": "fuzzed", "sampling": {"max_tokens": 2}, "max_seconds": 1.0},
        {
            **{f"sampling.{name}": value for name, value in _SAMPLING.items()},
            "policy": "base",
            "min_step": 0,
            "wait_s": 0.01,
            "follow": True,
            "on_conflict": "refuse",
            "max_calls": 3,
            "max_tokens": 50,
            "accept_reward": True,
            "metadata": {"a": "b"},
        },
    ),
    "/v1/completions": ({"model": "base", "prompt": [5, 6, 7], "max_tokens": 2}, _OPENAI | {"model": "policy"}),
    "/v1/chat/completions": ({"model": "base", "messages": _MESSAGES, "max_tokens": 2}, _CHAT | {"model": "policy"}),
    "/tokenize": ({"model": "base", "prompt": "the fox"}, {"messages": _MESSAGES, "return_token_strs": True}),
    "/detokenize": ({"model": "base", "tokens": [5, 6, 7]}, {"skip_special_tokens": False}),
}
#: Sampling parameters that have crashed engines, or would without checks. Sent in every campaign.
_DANGEROUS: list[dict[str, Any]] = [
    {"min_tokens": 1, "stop_token_ids": [511]},
    {"min_tokens": 1, "stop_token_ids": [512]},
    {"stop_token_ids": [-1]},
    {"min_tokens": 1, "stop_token_ids": [2**31]},
    {"stop_token_ids": [2**70]},
    {"logit_bias": {"512": 1.0}},
    {"logit_bias": {"-1": 1.0}},
    {"logit_bias": {"5": float("inf")}},
    {"logit_bias": {"5": float("nan")}},
    {"logit_bias": {str(i): -100.0 for i in range(512)}},
    {"allowed_token_ids": [512]},
    {"allowed_token_ids": [-1]},
    {"allowed_token_ids": [5], "structured_outputs": {"regex": "[x-z]+"}},
    {"allowed_token_ids": [2**70]},
    {"allowed_token_ids": [2], "min_tokens": 1, "stop_token_ids": [2]},
    {"bad_words": [" "] * 300},
    {"n": 16_385},
    {"n": 10**18},
    {"top_k": 2**40},
    {"top_k": 2**70},
    {"top_p": 5e-324},
    {"min_p": 1.0},
    {"temperature": 5e-324},
    {"temperature": 3.0},
    {"temperature": float("inf")},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e300},
    {"presence_penalty": float("nan")},
    {"stop": ["a"] * 500},
    {"stop": ["x" * 5000]},
    {"seed": 2**63},
    {"seed": -1},
    {"min_tokens": 10**12, "max_tokens": 10**12},
    {"structured_outputs": {"regex": "((a|b){1,30}){1,30}"}},
    {"structured_outputs": {"json": {"type": "string", "minLength": 10**7}}},
    {"structured_outputs": {"choice": [""]}},
    {"structured_outputs": {"json": '{"a":' * 500}},
    {"structured_outputs": {"grammar": "root ::= root"}},
    {"structured_outputs": {"grammar": 'root ::= "\\ud800"'}},
    {"structured_outputs": {"json": {"enum": []}}},
]
_SMALL = {"n": 4, "max_seconds": 0.5, "max_tokens": 8, "max_completion_tokens": 8, "best_of": 4, "wait_s": 0.01}
#: Servers refuse values above these; for values in between they would rightly work for a long time.
_REFUSED = {
    "n": 16_384,
    "max_seconds": 86_400.0,
    "max_tokens": 100_000,
    "max_completion_tokens": 100_000,
    "best_of": 10**9,
    "wait_s": 3600.0,
}


def tamed(body: Any) -> Any:
    """Return the body with small values where a server would accept large ones; keep values that it must refuse."""
    if isinstance(body, list):
        return [tamed(value) for value in body]
    if not isinstance(body, dict):
        return body
    tame = {}
    for key, value in body.items():
        tame[key] = tamed(value)
        if key in _SMALL and isinstance(value, int | float) and _SMALL[key] < value <= _REFUSED[key]:
            tame[key] = _SMALL[key]
        elif key in ("max_tokens", "max_completion_tokens") and value is None:
            tame[key] = 2
    return tame


def fuzz_bodies(target: Target, path: str, examples: int, number: int) -> None:
    """Send almost valid JSON."""
    right, optional = BODIES[path]

    def send(body: dict[str, Any]) -> None:
        if path.startswith("/v1/c"):  # else as many as the context allows
            body.setdefault("max_tokens", 2)
        if path == "/v1/sessions":  # else pushes would wait for them
            body.setdefault("max_seconds", 0.5)
        target.send(path, "POST", path, content=json_bytes(tamed(body)), headers=JSON)

    for parameters in _DANGEROUS if "max_tokens" in str(right) else ():
        body = copy.deepcopy(right)
        body.get("sampling", body).update(parameters)
        target.send(path, "POST", path, content=json_bytes(body), headers=JSON)
    every(changed(right, optional), examples, number, send)
    target.expect_unchanged(path)


_raw_bodies = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"prompts":' * 9000,
            b"\xff\xfe{}",
            b'"\\ud800"',
            b"9" * 6000,
            b'{"a":1,"a":2}',
        ]
    ),
    wild_values.map(json_bytes),
)
_leases = st.one_of(
    st.just(P.LEASE), st.just(P.LEASE), st.text(st.characters(max_codepoint=255), max_size=300), st.just("")
)
_run_ids = st.one_of(
    st.just("fuzzed"),
    st.just("fuzzed"),
    wild_texts,
    st.sampled_from(["..", "%2e%2e", "a/b", "%00", "r" * 64, "r" * 65, "r" * 3000, "r" * 30_000]),
)
_flags = st.one_of(st.sampled_from(["1", "0", "true", "keep", "carried", "drain"]), wild_texts)
_types = st.sampled_from(
    ["application/json", "text/plain", "application/octet-stream", "application/x-python-pickle", ""]
)


def _headers(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    headers = {"lockstep-lease": draw(_leases)}
    for name in draw(st.lists(st.sampled_from(["lockstep-takeover", "lockstep-in-flight"]), max_size=2, unique=True)):
        headers[name] = draw(_flags)
    headers["content-type"] = draw(_types)
    safe = [(name, "".join(c for c in value if c.isprintable())) for name, value in headers.items()]
    return [(name.encode(), value.strip().encode("latin-1", "replace")) for name, value in safe]


def _quoted(run_id: str) -> str:
    return run_id if "%" in run_id else quote(run_id.encode("utf-8", "replace"), safe="")


@st.composite
def _raw_requests(draw: st.DrawFn) -> tuple[str, str, list[tuple[bytes, bytes]], bytes, bool]:
    method, path = draw(
        st.sampled_from(
            [
                ("POST", "/v1/generate"),
                ("POST", "/v1/score"),
                ("PUT", "/v1/runs/{}/adapter"),
                ("POST", "/v1/runs/{}/group"),
                ("POST", "/v1/runs/{}/finish"),
                ("POST", "/v1/runs/{}/broadcast"),
                ("DELETE", "/v1/runs/{}"),
                ("GET", "/v1/runs/{}"),
                ("PATCH", "/v1/state"),
                ("POST", "/v1/completions"),
                ("POST", "/v1/chat/completions"),
                ("OPTIONS", "/v1/runs/{}/adapter"),
                ("GET", "/{}"),
                ("POST", "/tokenize"),
                ("GET", "/v1/sessions/{}"),
                ("DELETE", "/v1/sessions/{}"),
                ("POST", "/v1/sessions/{}/reward"),
                ("POST", "/v1/sessions/{}/v1/chat/completions"),
                ("HEAD", "/v1/models"),
            ]
        )
    )
    run_id, headers = draw(_run_ids), _headers(draw)
    if method == "DELETE" or path.endswith(("/group", "/finish")):  # with the right lease these would be valid
        headers = [(name, b"a stranger's lease" if value == P.LEASE.encode() else value) for name, value in headers]
    if method == "DELETE":
        headers = [(name, value) for name, value in headers if name != b"lockstep-takeover"]
    return method, path.format(_quoted(run_id)), headers, draw(_raw_bodies), draw(st.booleans())


def fuzz_raw(target: Target, examples: int, number: int) -> None:
    """Send bodies that are not JSON, and meaningless headers and paths, with and without a length."""

    def send(drawn: tuple[str, str, list[tuple[bytes, bytes]], bytes, bool]) -> None:
        method, path, headers, body, chunked = drawn
        target.send("raw", method, path, content=pieces(body, 64) if chunked else body, headers=headers)

    every(_raw_requests(), examples, number, send)
    target.expect_unchanged("raw requests")


def fuzz_announcements(target: Target, examples: int, number: int) -> None:
    """Announce broadcasts with the right lease, but without a group."""
    right = {"version": {"run_id": "fuzzed", "fence": 0, "step": 10**6}, "checksum": "0" * 32, "layout": "0" * 32}

    def send(body: dict[str, Any]) -> None:
        headers = JSON | {"Lockstep-Lease": P.LEASE}
        target.send("broadcast", "POST", "/v1/runs/fuzzed/broadcast", content=json_bytes(body), headers=headers)

    every(changed(right), examples, number, send)
    target.expect_unchanged("announcements")


def fuzz_adapters(target: Target, good: bytes, examples: int, number: int) -> None:
    """Push blobs to the run `fuzzed`: refused ones must change nothing, accepted ones be valid for another reader."""
    served = target.served_version("fuzzed")
    scores, refused, accepted = target.probe("fuzzed"), 0, 0

    def next_version() -> dict[str, Any]:
        return {"run_id": "fuzzed", "fence": served[0].fence, "step": served[0].step + 1}

    def send(drawn: tuple[bytes, int]) -> None:
        nonlocal served, scores, refused, accepted
        blob, size = drawn
        answer = _put(target, pieces(blob, size) if size else blob)
        now = target.served_version("fuzzed")
        if answer is not None and answer.status_code == 200:
            if not is_right(blob) or now[1] != take_apart(blob)[1]["checksum"]:
                target.tally.fail(f"adapter: accepted an invalid blob: {blob[:600]!r}")
            served, scores, accepted = now, target.probe("fuzzed"), accepted + 1
            return
        refused += 1
        if now != served or (refused % 50 == 0 and target.probe("fuzzed") != scores):
            target.tally.fail(f"adapter: a refusal changed what is served: {now}, it was {served}")
        served = now

    every(st.tuples(blobs(good, next_version), st.sampled_from([0, 0, 100, 5000])), examples, number, send)
    if not accepted or not refused:
        target.tally.fail(f"adapter: {accepted} blobs were accepted and {refused} refused: this tests nothing")
    # Push the first adapter again: every bit of the others must be gone from the slots.
    document, manifest, data = take_apart(good)
    _put(target, put_together(document, manifest | {"version": next_version()}, bytes(data)))
    target.served["runs"]["fuzzed"] = target.served_version("fuzzed")
    target.expect_unchanged("adapters")


def _put(target: Target, content: Any) -> Any:
    return target.send(
        "adapter", "PUT", "/v1/runs/fuzzed/adapter", content=content, headers={"Lockstep-Lease": P.LEASE}
    )
