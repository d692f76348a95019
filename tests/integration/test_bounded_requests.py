"""No single request of the generate role keeps `/health` from answering, or takes a gigabyte, whatever its shape."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.support.server import HTTP, ServerProcess

MIB = 2**20
_SIZE = 31 * MIB
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
PROPERTIES = {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(20000)}}
#: Each length is compiled for itself.
LENGTHS = {f"p{i}": {"type": "string", "maxLength": 100 + i} for i in range(20)}


def _filled(unit: bytes, head: bytes = b"", tail: bytes = b"", size: int = _SIZE) -> bytes:
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def _ours(**fields: Any) -> bytes:
    return json.dumps({"prompts": [{"token_ids": [5, 6]}], "policy": "base", **fields}).encode()


def _structured(**forms: Any) -> bytes:
    return _ours(sampling={"max_tokens": 4, "structured_outputs": forms})


def _chat(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


def _response_format(schema: Any) -> bytes:
    return _chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


GENERATE, SCORE, CHATS = "/v1/generate", "/v1/score", "/v1/chat/completions"
#: By name: path, body.
WORST: dict[str, tuple[str, Callable[[], bytes]]] = {
    "small-prompts": (GENERATE, lambda: _filled(b'{"token_ids":[1]},', b'{"prompts":[', b'{"token_ids":[1]}]}')),
    "many-prompts": (GENERATE, lambda: _ours(prompts=[{"token_ids": [1, 2]}] * 30000)),
    "wrong-prompts": (GENERATE, lambda: _ours(prompts=[{"x": 1}] * 400000)),
    "unknown-fields": (GENERATE, lambda: _ours(**{f"field_{i}": 0 for i in range(120000)})),
    "long-prompts": (GENERATE, lambda: _ours(prompts=[{"token_ids": [123456] * 8192}] * 500)),
    "one-long-prompt": (GENERATE, lambda: _ours(prompts=[{"token_ids": [5] * 2**20}])),
    "completions": (GENERATE, lambda: _ours(prompts=[{"token_ids": [5] * 900}], sampling={"n": 1024, "max_tokens": 1})),
    "many-texts": (GENERATE, lambda: _ours(prompts=[{"text": "a, " * (2 * MIB // 3)}] * 4)),
    "text": (GENERATE, lambda: _ours(prompts=[{"text": "the quick, brown fox " * (_SIZE // 21)}])),
    "messages": (GENERATE, lambda: _ours(prompts=[{"messages": [{"role": "user", "content": "a"}] * 60000}])),
    "brackets": (GENERATE, lambda: b"[" * _SIZE),
    "quotes": (GENERATE, lambda: _filled(b'"",', b"[", b'""]')),
    "escapes": (GENERATE, lambda: _filled(rb"\"", b'"')),
    "digits": (GENERATE, lambda: _filled(b"9", b'{"prompts":', b"}")),
    "sequences": (SCORE, lambda: json.dumps({"policy": "base", "sequences": [[5] * 8192] * 500}).encode()),
    "many-sequences": (SCORE, lambda: json.dumps({"policy": "base", "sequences": [[5, 6]] * 16384}).encode()),
    "wrong-sequences": (SCORE, lambda: json.dumps({"sequences": [[]] * 400000}).encode()),
    "chat-messages": (CHATS, lambda: _chat(messages=[1] * 10**6)),
    "chat-fields": (CHATS, lambda: _chat(**{f"field_{i}": 0 for i in range(60000)})),
    "chat-text": (CHATS, lambda: _chat(messages=[{"role": "user", "content": "a, " * (11 * MIB // 3)}])),
    "completion-floats": ("/v1/completions", lambda: json.dumps({"model": "base", "prompt": [1.5] * 10**6}).encode()),
    "completion-tokens": ("/v1/completions", lambda: json.dumps({"model": "base", "prompt": [5] * 500000}).encode()),
    "tokenize": ("/tokenize", lambda: json.dumps({"model": "base", "prompt": "word " * (11 * MIB // 5)}).encode()),
    "tokenize-largest": (
        "/tokenize",
        lambda: json.dumps({"model": "base", "prompt": "7" * (2**18 - 100), "return_token_strs": True}).encode(),
    ),
    "completion-truncated": (
        "/v1/completions",
        lambda: json.dumps(
            {"model": "base", "prompt": "a, " * (11 * MIB // 3), "truncate_prompt_tokens": 8, "max_tokens": 1}
        ).encode(),
    ),
    "completion-text": (
        "/v1/completions",
        lambda: json.dumps(
            {"model": "base", "prompt": "7" * (2 * MIB - 200), "truncate_prompt_tokens": 8, "max_tokens": 1}
        ).encode(),
    ),
    "detokenize": ("/detokenize", lambda: json.dumps({"model": "base", "tokens": [5] * 500000}).encode()),
    "schema": (GENERATE, lambda: _structured(json=PROPERTIES)),
    "regex": (GENERATE, lambda: _structured(regex="a{1,100000}")),
    "regex-nested": (GENERATE, lambda: _structured(regex="((a{99}){99}){99}")),
    "grammar": (GENERATE, lambda: _structured(grammar='root ::= "a"{100000}')),
    "choice": (GENERATE, lambda: _structured(choice=[f"label {i}" for i in range(10**5)])),
    "chat-schema": (CHATS, lambda: _response_format(PROPERTIES)),
    "chat-structured": (CHATS, lambda: _chat(structured_outputs={"json": PROPERTIES})),
    "chat-tag": (
        CHATS,
        lambda: _chat(
            response_format={
                "type": "structural_tag",
                "structures": [{"begin": "<a>", "schema": PROPERTIES, "end": "</a>"}],
                "triggers": ["<a>"],
            }
        ),
    ),
    "chat-tools": (
        CHATS,
        lambda: _chat(
            tools=[{"type": "function", "function": {"name": "f", "parameters": PROPERTIES}}],
            tool_choice={"type": "function", "function": {"name": "f"}},
        ),
    ),
    "responses-schema": (
        "/v1/responses",
        lambda: json.dumps(
            {
                "model": "base",
                "input": "hello",
                "text": {"format": {"type": "json_schema", "name": "x", "schema": PROPERTIES}},
            }
        ).encode(),
    ),
    # The largest that are taken.
    "largest-schema": (GENERATE, lambda: _structured(json={"properties": LENGTHS})),
}


class _Watch(threading.Thread):
    """Asks for `/health` all the time, and looks at the memory of the server's process."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self.url, self.process = server.url + "/health", psutil.Process(server.process.pid)
        self.slowest = 0.0
        self.before = self.peak = self.process.memory_info().rss
        self._end = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=60.0, trust_env=False) as client:
            while not self._end.is_set():
                began = time.monotonic()
                assert client.get(self.url).status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.peak = max(self.peak, self.process.memory_info().rss)
                time.sleep(0.02)

    def end(self) -> None:
        self._end.set()
        self.join(60)


@pytest.mark.parametrize("name", WORST)
def test_the_worst_of_each_kind(server: ServerProcess, name: str) -> None:
    path, make = WORST[name]
    body = make()
    # What blocks the server blocks it every time; a machine that stalls does not.
    for _ in range(3):
        watch = _Watch(server)
        watch.start()
        try:
            began = time.monotonic()
            answer = HTTP.post(
                server.url + path,
                content=body,
                headers={"content-type": "application/json"},
                timeout=httpx.Timeout(120.0),
            )
            seconds = time.monotonic() - began
        finally:
            watch.end()
        said = f"{name}: {answer.status_code} after {seconds:.2f} s, {answer.text[:200]}"
        print(f"{said}; health {watch.slowest:.2f} s, +{(watch.peak - watch.before) >> 20} MiB")
        if watch.slowest < 1.0:
            break
    assert answer.status_code in (200, 400, 413, 422), said
    assert watch.slowest < 1.0, said
    assert watch.peak - watch.before < 1024 * MIB, said


def test_others_get_their_formats_meanwhile(server: ServerProcess) -> None:
    """After all of the above, a small format is compiled at once."""
    began = time.monotonic()
    answer = HTTP.post(
        server.url + GENERATE, content=_structured(choice=["yes", "no"]), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began < 20
