"""Bodies are checked before anything parses them, and large ones parsed beside the event loop."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from rollout_server.api.app import build_app
from rollout_server.api.bodies import check_body
from rollout_server.generation import requests
from shared.errors import InvalidRequest, TooLarge
from shared.rollouts import GenerateRequest, RolloutGroup

GENERATE, SCORE, CHAT, COMPLETIONS = (
    {"path": f"/v1/{p}"} for p in ("generate", "score", "chat/completions", "completions")
)
WIDE = {"properties": {f"property_{i}": {} for i in range(20000)}}


def _json(**document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


async def test_a_large_training_is_taken() -> None:
    row = list(range(100000, 108192))
    for path, body in ((GENERATE, _json(prompts=[{"token_ids": row}] * 512)), (SCORE, _json(sequences=[row] * 512))):
        assert len(body) < 32 * 2**20, "--max-body-mib"
        assert await check_body(path, body) < 2**28
    await check_body(GENERATE, _json(prompts=[{"messages": [{"role": "user", "content": "a"}] * 4}] * 16384))


async def test_what_clients_send_to_vllm_is_taken() -> None:
    packed = {"type": "text", "text": "QUJD" * 2**16}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what, and why? {[" * 5000}, packed]}] * 4
    parameters = {"type": "object", "properties": {f"p{i}": {"description": "it is " * 50} for i in range(20)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(100)]
    await check_body(CHAT, _json(messages=messages, tools=tools))
    await check_body(COMPLETIONS, _json(prompt=[list(range(8192))] * 40, allowed_token_ids=list(range(10**5))))
    await check_body({"path": "/detokenize"}, _json(tokens=list(range(10**5))))
    await check_body(CHAT, b"no JSON")  # vLLM says so


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        (GENERATE, b'{"prompts":[' + b'{"token_ids":[1]},' * 10**6 + b"{}]}", TooLarge),
        (GENERATE, b"[" * 10**6, TooLarge),
        (SCORE, b'{"sequences":[' + b"[]," * 10**6 + b"[]]}", TooLarge),
        (CHAT, _json(messages=[{}] * 40000), TooLarge),
        (CHAT, _json(**{f"field{i}": 0 for i in range(70000)}), TooLarge),
        (CHAT, _json(messages=[1] * 5000), InvalidRequest),
        (CHAT, _json(messages=[{"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]), InvalidRequest),
        (CHAT, _json(vllm_xargs={"x": {"y": [[1] * 5000]}}), InvalidRequest),
        (COMPLETIONS, _json(prompt=[1.5] * 5000), InvalidRequest),
        (COMPLETIONS, _json(prompt=["a"] * 5000), InvalidRequest),
        (COMPLETIONS, _json(structured_outputs={"json": WIDE}), InvalidRequest),
        (COMPLETIONS, _json(structured_outputs={"structural_tag": json.dumps({"x": WIDE})}), InvalidRequest),
        (CHAT, _json(response_format={"type": "json_schema", "json_schema": {"schema": WIDE}}), InvalidRequest),
        (CHAT, _json(response_format={"type": "structural_tag", "structures": [{"schema": WIDE}]}), InvalidRequest),
    ],
)
async def test_shapes_that_are_refused(path: dict[str, str], body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        await check_body(path, body)


async def test_formats_that_vllm_would_ignore() -> None:
    await check_body(CHAT, _json(structured_outputs={"choice": ["a"]}, guided_json=None))
    with pytest.raises(InvalidRequest, match=r"guided_choice .*structured_outputs"):
        await check_body(CHAT, _json(guided_choice=["a"]))


@pytest.mark.parametrize(
    "ignored",
    [
        {"best_of": 4},
        {"best_of": 4, "n": 2},
        {"functions": [{"name": "f"}]},
        {"conversation": {"id": "conv_1"}},
        {"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]},
        {"web_search_options": {"search_context_size": "low"}},
    ],
)
async def test_fields_that_vllm_would_ignore(ignored: dict[str, Any]) -> None:
    await check_body(COMPLETIONS, _json(prompt="a", n=2, best_of=2, functions=None, logits_processors=[]))
    with pytest.raises(InvalidRequest, match="would have no effect: send "):
        await check_body(COMPLETIONS, _json(prompt="a", **ignored))


@pytest.mark.parametrize(
    "kind", ["web_search_preview", "file_search", "code_interpreter", "mcp", "web_search_20250305"]
)
async def test_tools_that_nothing_would_run(kind: str) -> None:
    """vLLM answers without them, as agents expect that offer them beside their own."""
    path = {"path": "/v1/responses"}
    own = [{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}, {"name": "of Anthropic"}]
    for tools in (own, None, "none", [1, {"type": 7}]):  # vLLM says what is wrong with these
        await check_body(path, _json(input="a", tools=tools))
    with pytest.raises(InvalidRequest, match=f"tools holds '{kind}'.*send a tool of type function"):
        await check_body(path, _json(input="a", tools=[{"type": kind}, {"type": kind}]))
    await check_body(path, _json(input="a", tools=[*own, {"type": kind}]))
    await check_body(path, _json(input="a", tools=[{"type": kind}]), tool_server=True)


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
async def test_a_field_that_vllm_would_take_for_an_object(name: str) -> None:
    """vLLM would answer 500 without a word."""
    await check_body(COMPLETIONS, _json(prompt="a", vllm_xargs={"own": 1}, **{name: {"a": 1}}))
    with pytest.raises(InvalidRequest, match=f"vllm_xargs holds {name}"):
        await check_body(COMPLETIONS, _json(prompt="a", vllm_xargs={name: 1}))


@pytest.mark.parametrize("field", ["request_id", "model", "user", "prompt"])
async def test_half_a_character_is_refused_before_anything_is_sampled(field: str) -> None:
    """vLLM would sample, and then not be able to send the answer."""
    await check_body(COMPLETIONS, json.dumps({field: "good \U0001f600"}).encode())
    with pytest.raises(InvalidRequest, match=r"'good \\ud83d' ends in half a character"):
        await check_body(COMPLETIONS, json.dumps({field: "good \ud83d, cut"}).encode())


def _called(form: str, arguments: Any) -> bytes:
    """Return a body with a call of a tool in its history."""
    if form == "responses":
        return _json(input=[{"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}])
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return _json(messages=[{"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("form", ["chat/completions", "responses"])
async def test_arguments_of_tools_are_bounded_as_the_body_is(form: str) -> None:
    """They are JSON in a string, which vLLM parses, too: it would answer 500 where they are nested deeply."""
    path = {"path": f"/v1/{form}"}
    for written in ('{"a": 3}', "{", "", "null", '"x"', '{"a": "\\\\ud83d"}', "9" * 5000, '"\\ud83d"'):
        await check_body(path, _called(form, written))
    await check_body(path, _called(form, {"a": 3}))  # vLLM says so
    for nested in ('{"a":' + "[" * 3000 + "]" * 3000 + "}", "[" * 200):
        with pytest.raises(TooLarge, match="nested more than 100 levels"):
            await check_body(path, _called(form, nested))
    with pytest.raises(TooLarge, match="objects and lists"):
        await check_body(path, _called(form, "[" + "[]," * 40000 + "[]]"))
    with pytest.raises(InvalidRequest, match="ends in half a character"):
        await check_body(path, _called(form, '{"a": "good \\ud83d"}'))


@pytest.mark.parametrize("context", [0, 2**17, 2**20])
async def test_text_of_one_prompt_is_bounded_on_vllms_routes(context: int) -> None:
    """Also where it is to be truncated: vLLM tokenizes it first."""
    most = max(2**21, 8 * context)
    await check_body(COMPLETIONS, _json(prompt=["a" * (most // 2 + 1)] * 2), context)
    for path, fields in (
        (COMPLETIONS, {"prompt": "a" * (most + 1), "truncate_prompt_tokens": 16}),
        (COMPLETIONS, {"prompt": ["a", "é" * (most // 2 + 1)], "truncate_prompt_tokens": -1}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * (most // 2)}] * 2, "truncate_prompt_tokens": 16}),
        ({"path": "/v1/responses"}, {"input": "a" * (most + 1), "truncation": "auto"}),
        ({"path": "/v1/messages"}, {"messages": [], "system": "a" * (most + 1)}),
    ):
        with pytest.raises(InvalidRequest, match="bytes of text"):
            await check_body(path, json.dumps(fields, ensure_ascii=False).encode(), context)


async def test_longer_text_can_be_tokenized_on_our_route() -> None:
    """vLLM makes its answer on the event loop; ours names the way that does not."""
    await check_body({"path": "/tokenize"}, _json(prompt="a" * (2**18 - 20)))
    with pytest.raises(TooLarge, match=r"256 KiB .*/v1/generate .*prompt_token_ids"):
        await check_body({"path": "/tokenize"}, _json(prompt="a" * 2**18))
    await check_body(GENERATE, _json(prompts=[{"text": "a" * 2**20}]))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    async def generate(body: GenerateRequest, *_: Any):
        for index, prompt in enumerate(body.prompts):
            yield RolloutGroup(prompt_index=index, prompt_token_ids=prompt.token_ids[:2], completions=[])

    monkeypatch.setattr(requests, "generate", generate)
    service = SimpleNamespace(served=SimpleNamespace(epoch="e"), proxy=None, exclusive=None)
    app = build_app(service, FastAPI())  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


@pytest.mark.parametrize("size", [10, 20000])
async def test_small_and_large_bodies_are_answered_alike(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    async def never(self: Request) -> Any:
        pytest.fail("parsed on the event loop")

    async def post(body: bytes) -> httpx.Response:
        return await client.post("/v1/generate", content=body, headers={"content-type": "application/json"})

    monkeypatch.setattr(Request, "json", never)
    row = [1234] * size
    answer = await post(_json(prompts=[{"token_ids": row}, {"token_ids": row}]))
    assert [group["prompt_token_ids"] for group in answer.json()["groups"]] == [row[:2]] * 2
    for wrong, field in (
        ({"token_ids": [*row, "x"]}, "prompts.0.token_ids"),
        ({"token_ids": row, "x": 1}, "prompts.0.x"),
    ):
        answer = await post(_json(prompts=[wrong]))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_request"
        assert field in answer.json()["error"]["message"]
    answer = await post(_json(prompts=[{"token_ids": row}])[:-1])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
