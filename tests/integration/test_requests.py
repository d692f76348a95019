"""Responses and refusals of `/v1/generate` and `/v1/score`."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from learner.servers.client import RolloutClient
from shared.rollouts import GenerateResponse, RolloutGroup, ScoreRequest
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP

PROMPT = [5, 17, 99, 260, 41]


def _post(client: RolloutClient, body: dict, path: str = "/v1/generate") -> httpx.Response:
    headers = {"content-type": "application/json"}  # escaped, so that it can hold what is no character
    return HTTP.post(client.url + path, content=json.dumps(body), headers=headers)


def test_three_forms_of_prompt(client: RolloutClient, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "the quick brown fox"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    body = {
        "prompts": [{"token_ids": PROMPT}, {"text": "the lazy dog"}, {"messages": messages}],
        "policy": "base",
        "sampling": {"max_tokens": 5, "n": 3, "ignore_eos": True},
    }
    groups = _post(client, body).json()["groups"]
    assert [group["prompt_token_ids"] for group in groups] == [PROMPT, tokenizer("the lazy dog")["input_ids"], chat]
    for group in groups:
        assert len(group["completions"]) == 3
        for completion in group["completions"]:
            assert len(completion["token_ids"]) == len(completion["logprobs"]) == 5
            assert completion["finish_reason"] == "length"
            assert completion["spans"] == [{"version": None, "start": 0, "end": 5, "kv": "fresh"}]
            decoded = tokenizer.decode(completion["token_ids"], skip_special_tokens=True)
            assert completion["text"] == decoded


def test_special_tokens_are_kept(client: RolloutClient, model: Path) -> None:
    """The end-of-sequence token is part of the completion, as TRL needs it."""
    eos = AutoTokenizer.from_pretrained(model).eos_token_id
    body = {
        "prompts": [{"token_ids": PROMPT}],
        "policy": "base",
        "return_text": True,
        "sampling": {"max_tokens": 8, "logit_bias": {str(eos): 100.0}},
    }
    completion = _post(client, body).json()["groups"][0]["completions"][0]
    assert completion["token_ids"] == [eos]
    assert completion["finish_reason"] == "stop"
    assert completion["text"] == ""


def test_a_stop_string_may_be_a_special_token(client: RolloutClient) -> None:
    """Which the text that is searched leaves out."""
    sampling = {"max_tokens": 8, "stop": ["<|im_start|>"], "logit_bias": {"1": 100.0}}
    body = {"prompts": [{"token_ids": PROMPT}], "policy": "base", "return_text": True, "sampling": sampling}
    completion = _post(client, body).json()["groups"][0]["completions"][0]
    assert completion["token_ids"] == [1]
    assert completion["finish_reason"] == "stop"
    assert completion["text"] == ""


def test_ndjson_groups_as_they_finish(client: RolloutClient) -> None:
    body = {
        "prompts": [{"token_ids": [*PROMPT, i]} for i in range(4)],
        "policy": "base",
        "stream": True,
        "sampling": {"max_tokens": 6, "n": 2},
    }
    with httpx.stream("POST", client.url + "/v1/generate", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1]["done"] is True
    assert sorted(RolloutGroup.model_validate(line).prompt_index for line in lines[:-1]) == [0, 1, 2, 3]


def test_seeded_request_with_a_long_prompt_does_not_kill_the_engine(client: RolloutClient) -> None:
    """The prompt is prefilled in several chunks (--max-num-batched-tokens 256), beside other requests."""
    long = {
        "prompts": [{"token_ids": [(7 * i) % 250 + 3 for i in range(700)]}],
        "policy": "base",
        "sampling": {"max_tokens": 16, "seed": 11, "n": 2, "ignore_eos": True},
    }
    other = {
        "prompts": [{"token_ids": [i, *PROMPT]} for i in range(8)],
        "policy": "base",
        "sampling": {"max_tokens": 60, "seed": 5, "ignore_eos": True},
    }
    alone = _post(client, long).json()["groups"][0]["completions"]
    with ThreadPoolExecutor() as pool:
        crowd = pool.submit(_post, client, other)
        crowded = _post(client, {**long, "prompts": [{"token_ids": long["prompts"][0]["token_ids"]}]}).json()
        assert crowd.result().status_code == 200
    again = crowded["groups"][0]["completions"]
    assert [c["token_ids"] for c in again] == [c["token_ids"] for c in alone], "a seed must mean the same completion"
    chat = {"model": "base", "prompt": [3 + i % 200 for i in range(600)], "max_tokens": 4, "seed": 1}
    assert _post(client, chat, "/v1/completions").status_code == 200
    assert HTTP.get(client.url + "/health").status_code == 200


REFUSED = {
    "unknown-field": ({"sampling": {"temprature": 1}}, "temprature"),
    "contradiction": ({"sampling": {"min_tokens": 9, "max_tokens": 3}}, "min_tokens"),
    "greedy-group": ({"sampling": {"temperature": 0, "n": 4}}, "temperature=0"),
    "top-p": ({"sampling": {"top_p": 0}}, "top_p"),
    "two-forms": ({"prompts": [{"text": "a", "token_ids": [1]}]}, "exactly one"),
    "empty-prompt": ({"prompts": [{"token_ids": []}]}, "token_ids"),
    "vocabulary": ({"prompts": [{"token_ids": [10**6]}]}, "vocabulary"),
    "beyond-the-model": ({"sampling": {"max_tokens": 5000}}, "--max-model-len"),
    "min-step-of-base": ({"min_step": 3}, "min_step"),
    "structured": ({"sampling": {"structured_outputs": {"regexp": "a"}}}, "sampling"),
    "template": (
        {
            "prompts": [{"messages": [{"role": "user", "content": "a"}]}],
            "chat_template_kwargs": {"chat_template": "{{ 1 }}"},
        },
        "the server's own",
    ),
    "unknown-top-level": ({"polizy": "base"}, "polizy"),
    "by-vllm-itself": ({"sampling": {"bad_words": [""]}}, "bad_words"),
    "a-template-of-ones-own": (
        {"prompts": [{"messages": [{"role": "user", "content": "a"}]}], "chat_template_kwargs": {"chat_template": "b"}},
        "chat_template",
    ),
    "stop-that-is-skipped": ({"sampling": {"stop": ["a<|im_start|>"]}}, "skip_special_tokens"),
    "variables-of-no-template": ({"chat_template_kwargs": {"enable_thinking": False}}, "messages"),
    "half-a-character": ({"prompts": [{"text": "\ud800"}]}, "text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_name_the_field(client: RolloutClient, case: str) -> None:
    change, word = REFUSED[case]
    answer = _post(client, {"prompts": [{"token_ids": PROMPT}], "policy": "base", **change})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_versions_as_a_precondition(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model)
    P.randomize(policy, seed=9)
    P.push(client, policy, "precondition", step=3)
    ask = {"prompts": [{"token_ids": PROMPT}], "sampling": {"max_tokens": 2}}
    version = {"run_id": "precondition", "fence": 0, "step": 3}
    assert _post(client, {**ask, "policy": version}).status_code == 200
    other = _post(client, {**ask, "policy": {**version, "step": 4}})
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "version_not_active"
    waited = _post(client, {**ask, "min_step": 4, "wait_s": 0.2})
    assert waited.status_code == 409
    assert waited.json()["error"]["code"] == "step_not_reached"
    unknown = _post(client, {**ask, "run_id": "nobody"})
    assert unknown.status_code == 404
    assert "precondition" in unknown.json()["error"]["message"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(_post, client, {**ask, "min_step": 4, "wait_s": 30})
        P.push(client, policy, "precondition", step=4)
        spans = waiting.result().json()["groups"][0]["completions"][0]["spans"]
    assert spans[0]["version"]["step"] == 4


def test_policy_and_base_on_the_openai_routes(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model)
    P.randomize(policy, seed=10)
    P.push(client, policy, "openai", step=0)
    models = [m["id"] for m in HTTP.get(client.url + "/v1/models").json()["data"]]
    assert models == ["base", "policy", "policy:openai"]
    texts = {
        name: _post(client, {"model": name, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}, "/v1/completions")
        for name in models
    }
    answers = {name: answer.json()["choices"][0]["text"] for name, answer in texts.items()}
    assert answers["policy"] == answers["policy:openai"] != answers["base"]
    missing = _post(client, {"model": "nobody", "prompt": PROMPT}, "/v1/completions")
    assert missing.status_code == 404
    for path, body in (("/v1/completions", {"prompt": PROMPT}), ("/v1/messages", {"messages": [], "max_tokens": 1})):
        missing = _post(client, {"model": "policy:nobody", **body}, path)
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "unknown_run"
        assert "openai" in missing.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["image_url", "audio_url", "video_url"])
def test_no_url_of_a_request_is_fetched(client: RolloutClient, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.5)
        url = f"http://127.0.0.1:{bait.getsockname()[1]}/x.png"
        content = [{"type": "text", "text": "what is this?"}, {"type": kind, kind: {"url": url}}]
        asked = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": content}]},
            "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
        }
        for path, body in asked.items():
            answer = _post(client, {"model": "base", **body}, path)
            assert 400 <= answer.status_code < 500, answer.text
        with pytest.raises(TimeoutError):
            bait.accept()


def test_scores_beside_decoding(client: RolloutClient, model: Path) -> None:
    """Prompt logprobs need more rows than are sampled; score base and policy beside sampled requests."""
    policy = P.make_policy(model)
    P.randomize(policy, seed=12)
    P.push(client, policy, "scores", step=0)
    sequences = [[3 + (7 * i + j) % 290 for j in range(20 + 9 * i)] for i in range(8)]
    body = {"prompts": [{"token_ids": PROMPT}], "sampling": {"n": 4, "max_tokens": 150, "ignore_eos": True}}
    with ThreadPoolExecutor() as pool:
        decoding = [pool.submit(_post, client, {**body, "policy": which}) for which in ("base", "latest")]
        for _ in range(3):
            served = client.score(ScoreRequest(sequences=sequences)).logprobs
            for sequence, logprobs in zip(sequences, served, strict=True):
                assert (torch.tensor(logprobs) - P.reference(policy, sequence)).abs().max() < 1e-4
        answers = [GenerateResponse.model_validate(future.result().json()) for future in decoding]
    with policy.disable_adapter():
        assert P.largest_gap(policy, answers[0]) < 1e-4
    assert P.largest_gap(policy, answers[1]) < 1e-4


TRUNCATIONS = [
    {"top_p": 0.8, "temperature": 0.9},
    {"top_k": 5, "temperature": 1.2},
    {"min_p": 0.1},
    {"top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7},
    {"temperature": 0.9},
    {"temperature": 0.0, "top_p": 0.5, "n": 1},
]


def test_mass_that_truncation_kept(client: RolloutClient, model: Path) -> None:
    """Requests with different truncation, and some without, decoded in the same batch."""
    policy = P.make_policy(model)
    P.randomize(policy, seed=13)
    P.push(client, policy, "masses", step=0)
    asks = [{"n": 4, "max_tokens": 50, "ignore_eos": True, **truncation} for truncation in TRUNCATIONS]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda ask: P.generate(client, [PROMPT, PROMPT[1:]], **ask), asks))
    for ask, answer in zip(asks, answers, strict=True):
        for group in answer.groups:
            for completion in group.completions:
                whole, begin = group.prompt_token_ids + completion.token_ids, len(group.prompt_token_ids) - 1
                full = P.reference(policy, whole, ask.get("temperature", 1.0) or 1.0)[begin:]
                served = torch.tensor(completion.logprobs)
                if not ask.keys() & {"top_p", "top_k", "min_p"} or ask.get("temperature") == 0.0:
                    assert completion.log_kept_mass is None
                    assert (served - full).abs().max() < 1e-4
                    continue
                mass = torch.tensor(completion.log_kept_mass)
                assert (served + mass - full).abs().max() < 1e-4
                assert mass.max() <= 0.0
                assert mass.min() < -0.01
                if ask.keys().isdisjoint({"top_p", "min_p"}):
                    kept = P.top_k_mass(policy, whole, ask["top_k"], ask["temperature"])[begin:]
                    assert (mass - kept).abs().max() < 1e-4


def test_metrics_of_both(client: RolloutClient) -> None:
    text = HTTP.get(client.url + "/metrics").text
    assert "lockstep_pushes_total" in text
    assert "vllm:" in text
