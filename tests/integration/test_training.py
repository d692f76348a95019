"""Complete trainings as a user starts them: killed and resumed to the same bytes, and with prefetched rollouts.

All of them use a token; neither the token nor the prompts may appear in the log.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from learner.servers.client import RolloutClient
from learner.utils.ports import free_port
from shared.errors import ErrorCode, LockstepError
from shared.weights import WeightVersion
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.forked import FORKING
from tests.integration.support.learner_process import LearnerProcess, write_questions
from tests.integration.support.lm_tasks import ANSWER, CHOICE, QUESTIONS, write_tasks
from tests.integration.support.monitoring import monitor
from tests.integration.support.server import ENVIRONMENT, HTTP, ServerProcess, running_server
from tests.integration.support.waiting import until
from tests.support.arguments import arguments
from tests.support.dashboard import names_asked_for

TOKEN = "a-token-of-the-training-tests"
DETERMINISTIC = arguments(
    {
        "--deterministic": "true",
        "--max_steps": 9,
        "--save_steps": 2,
        "--steps_per_generation": 3,
        "--lora_dropout": "0.1",
        "--proof_canary": "false",
    }
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("task") / "questions.jsonl")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token file for both sides."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


@pytest.fixture(scope="module")
def server(model: Path, token_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A deterministic server with a token, for several runs in sequence, with vLLM's default logging."""
    flags = [*FLAGS, "--deterministic", "--max-runs", "8", "--token-file", token_file]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "VLLM_LOGGING_LEVEL", "INFO")
        patch.setitem(ENVIRONMENT, "PYTHONPATH", FORKING)
        with running_server(model, tmp_path_factory.mktemp("server"), *flags, forked=False) as process:
            yield process


def test_killed_and_resumed_to_the_same_bytes(
    server: ServerProcess, model: Path, task: Path, token_file: str, tmp_path: Path
) -> None:
    """Killed inside generation batches; the server is first ahead of the checkpoint, and after a restart behind it."""
    flags = [*DETERMINISTIC, "--token_file", token_file]
    whole = LearnerProcess(server.url, model, task, tmp_path / "whole", *flags)
    summary = whole.finish()
    assert summary["steps"] == summary["pushes"] == 9

    cut = [server.url, model, task, tmp_path / "cut", *flags]
    LearnerProcess(*cut).kill_after(3)
    LearnerProcess(*cut).kill_after(5)
    with running_server(model, tmp_path, *FLAGS, "--deterministic", "--token-file", token_file) as another:
        resumed = LearnerProcess(another.url, *cut[1:])
        again = resumed.finish()
    assert resumed.adapter_digest() == whole.adapter_digest()
    assert {name: again[name] for name in ("steps", "pushes", "completions", "completion_tokens")} == {
        name: summary[name] for name in ("steps", "pushes", "completions", "completion_tokens")
    }
    lease = json.loads((tmp_path / "cut" / "lease.json").read_text())
    assert lease["fence"] == 2


def test_rollouts_run_ahead_within_the_bound(
    server: ServerProcess, model: Path, task: Path, token_file: str, tmp_path: Path
) -> None:
    port = free_port()
    # Many passes to a step, so that requests are admitted before the push that follows it.
    flags = arguments(
        {
            "--max_staleness": 1,
            "--max_steps": 6,
            "--save_strategy": "no",
            "--token_file": token_file,
            "--metrics_port": port,
            "--per_device_train_batch_size": 1,
            "--gradient_accumulation_steps": 8,
        }
    )
    learner = LearnerProcess(server.url, model, task, tmp_path / "ahead", *flags)
    metrics = monitor(server, learner, port, TOKEN, token_file)
    summary = learner.finish()
    assert {
        name for name in names_asked_for() if re.sub("_(total|bucket|sum|count)$", "", name) not in metrics
    } == set()
    assert 'lockstep_policy_step{run_id="ahead-' in metrics
    assert 'canary"} ' not in metrics
    # A request that meets a proof on its way may be admitted after the next push already.
    assert set(summary["lags"]) == {"0", "1"}
    assert summary["lags"]["1"] >= 24
    assert summary["regenerated"] == 0
    assert sum(summary["lags"].values()) == summary["completions"] == 48
    assert summary["max_logprob_gap"] < 1e-4
    history = [json.loads(line) for line in (tmp_path / "ahead" / "metrics.jsonl").read_text().splitlines()]
    assert history[0]["lag"] == 0
    assert max(step["lag"] for step in history) == 1
    assert all(step["idle_seconds"] is not None for step in history)


def test_killed_and_resumed_with_rollouts_ahead(
    server: ServerProcess, model: Path, task: Path, token_file: str, tmp_path: Path
) -> None:
    """Prefetched prompts are requested again; nothing is counted twice, and no stale sample is trained on."""
    flags = arguments(
        {
            "--max_staleness": 1,
            "--max_steps": 7,
            "--save_steps": 2,
            "--proof_canary": "false",
            "--token_file": token_file,
        }
    )
    command = (server.url, model, task, tmp_path / "again", *flags)
    LearnerProcess(*command).kill_after(3)
    summary = LearnerProcess(*command).finish()
    assert summary["steps"] == summary["pushes"] == 7
    assert summary["completions"] == 7 * 8
    assert set(summary["lags"]) <= {"0", "1"}
    assert summary["regenerated"] == 0


@pytest.fixture(scope="module")
def live(
    server: ServerProcess, model: Path, task: Path, token_file: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LearnerProcess]:
    """A training that runs during the tests that use it."""
    flags = arguments(
        {
            "--max_steps": 100000,
            "--learning_rate": "1e-5",
            "--save_strategy": "no",
            "--proof_canary": "false",
            "--token_file": token_file,
        }
    )
    learner = LearnerProcess(server.url, model, task, tmp_path_factory.mktemp("live") / "live", *flags)
    try:
        until(lambda: learner.steps() >= 1 or learner.process.poll() is not None, 120.0)
        yield learner
        assert learner.process.poll() is None, learner.tail()
    finally:
        learner.kill()


def _version(answer: Any) -> WeightVersion:
    return WeightVersion.parse(answer.headers["Lockstep-Version"])


def test_the_openai_sdk_beside_a_training(server: ServerProcess, live: LearnerProcess) -> None:
    """Policy and base, streamed or not, each with its version; a requested version is returned or refused."""
    policy, messages = f"policy:{live.run_id()}", [{"role": "user", "content": "the quick brown fox"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as api:
        assert {"base", policy} <= {model.id for model in api.models.list()}
        raw, texts, versions = api.chat.completions.with_raw_response, {}, []
        for name in (policy, "base"):
            ask: dict[str, Any] = {
                "model": name,
                "messages": messages,
                "max_tokens": 8,
                "temperature": 0.0,
                "extra_body": {"ignore_eos": True},
            }
            whole, streamed = raw.create(**ask), raw.create(**ask, stream=True)
            parts = [chunk.choices[0].delta.content or "" for chunk in streamed.parse() if chunk.choices]
            texts[name] = whole.parse().choices[0].message.content, "".join(parts)
            assert whole.parse().usage.completion_tokens == 8
            assert len(parts) > 1
            if name == "base":
                assert whole.headers["Lockstep-Version"] == streamed.headers["Lockstep-Version"] == "base"
            else:
                versions += [_version(whole), _version(streamed)]
        assert texts["base"][0] == texts["base"][1]
        assert versions[0] <= versions[1]
        until(lambda: live.steps() > versions[1].step or live.process.poll() is not None, 60.0)
        later = api.completions.with_raw_response.create(model=policy, prompt="the fox", max_tokens=2)
        assert _version(later) > versions[0]
        for stream in (False, True):
            with pytest.raises(openai.ConflictError) as conflict:
                old = {"Lockstep-Policy": str(versions[0])}
                api.completions.create(model=policy, prompt="the fox", stream=stream, extra_headers=old)
            assert conflict.value.code == "version_not_active"


def test_plain_http_beside_a_training(server: ServerProcess, live: LearnerProcess) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {
        "model": f"policy:{live.run_id()}",
        "prompt": "the quick",
        "max_tokens": 6,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60.0) as answer:
        assert answer.status_code == 200
        assert _version(answer).run_id == live.run_id()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert len(lines) > 2
    assert "choices" in json.loads(lines[0])


def test_lm_eval_beside_a_training(
    server: ServerProcess, live: LearnerProcess, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logprobs of given tokens and chat completions; those of the base are compared with our own forward."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    tasks = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    tokenizer, before = AutoTokenizer.from_pretrained(model), live.steps()

    def run(kind: str, path: str, name: str, task: str, **options: Any) -> list[dict[str, Any]]:
        at = f"model={name},base_url={server.url}{path},tokenizer={model},tokenizer_backend=huggingface,max_length=512"
        done = simple_evaluate(
            model=kind,
            model_args=f"{at},num_concurrent=2",
            tasks=[task],
            task_manager=tasks,
            bootstrap_iters=0,
            **options,
        )
        return done["samples"][task]

    base = P.make_policy(model)
    for name in ("base", f"policy:{live.run_id()}"):
        choices = run("local-completions", "/v1/completions", name, CHOICE)
        assert len(choices) == len(QUESTIONS)
        if name != "base":
            continue
        for row, sample in zip(QUESTIONS, sorted(choices, key=lambda s: s["doc_id"]), strict=True):
            begun = tokenizer(row["question"])["input_ids"]
            for choice, answer in zip(row["choices"], sample["filtered_resps"], strict=True):
                whole = tokenizer(row["question"] + choice)["input_ids"]
                expected = P.reference(base, whole)[len(begun) - 1 :].sum().item()
                assert answer[0] == pytest.approx(expected, abs=1e-3)
        answers = run("local-chat-completions", "/v1/chat/completions", name, ANSWER, apply_chat_template=True)
        assert len(answers) == len(QUESTIONS)
        assert all(isinstance(s["resps"][0][0], str) for s in answers)
    assert live.steps() > before, "nothing was trained meanwhile"


def test_a_push_does_not_overtake_on_a_deterministic_server(server: ServerProcess, model: Path) -> None:
    with RolloutClient(server.url, TOKEN) as client:
        policy = P.make_policy(model)
        P.push(client, policy, "drained", 0)
        blob = P.blob(policy, WeightVersion(run_id="drained", step=1), client.state().base.weights)
        with pytest.raises(LockstepError, match="use drain"):
            client.push("drained", [blob], P.LEASE, in_flight="keep")


#: Requests as they may come over a socket, with what looks like an open path, or like another server's.
WITHOUT_A_TOKEN = [
    "GET /v1/state",
    "POST /v1/generate",
    "GET /metrics",
    "GET /metrics/",
    "GET /openapi.json",
    "OPTIONS /v1/generate",
    "OPTIONS *",
    "GET //v1/state",
    "GET /health/../v1/state",
    "GET /health%2f..%2fv1%2fstate",
    "GET /%76%31/state",
    "GET http://server/v1/state",
    "GET /v1/state?/health",
    "GET /v1/state#/health",
    "GET /health;/../v1/state",
    "PUT /v1/runs/r/adapter",
    "DELETE /v1/runs/ahead",
    "POST /invocations",
    "POST /collective_rpc",
    "HEAD /v1/models",
]


def test_nobody_gets_in_without_a_token(server: ServerProcess) -> None:
    upgrade = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    for line in WITHOUT_A_TOKEN:
        assert _status(server, line) in (400, 401), line
        assert _status(server, line, "Authorization: Bearer a-token-of-the-training-test\r\n") in (400, 401), line
    for path in ("/v1/realtime", "/health", "/v1/generate"):
        assert _status(server, f"GET {path}", upgrade, connection="Upgrade") in (400, 401, 403)
    assert _status(server, "GET /health") == _status(server, "GET /ready") == 200
    with RolloutClient(server.url) as client, pytest.raises(LockstepError, match="--token_file") as refusal:
        client.state()
    assert refusal.value.code is ErrorCode.UNAUTHENTICATED


def _status(server: ServerProcess, line: str, headers: str = "", connection: str = "close") -> int:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        wire.sendall(f"{line} HTTP/1.1\r\nHost: server\r\nConnection: {connection}\r\n{headers}\r\n".encode())
        return int(wire.recv(4096).split()[1])


def test_neither_prompts_nor_tokens_are_logged(server: ServerProcess, task: Path) -> None:
    """Neither by earlier tests of this file, nor by requests that are refused or fail."""
    secret, ids = "mellifluous armadillo", [251, 252, 253, 254]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    asked: list[tuple[str, dict]] = [
        ("/v1/generate", {"prompts": [{"text": secret}], "policy": "base", "sampling": {"max_tokens": 2}}),
        ("/v1/generate", {"prompts": [{"token_ids": ids}], "policy": "base", "sampling": {"max_tokens": 2}}),
        ("/v1/generate", {"prompts": [{"token_ids": ids * 300}], "policy": "base"}),
        ("/v1/generate", {"prompts": [{"text": secret}], "policy": secret}),
        ("/v1/score", {"sequences": [ids], "policy": "base"}),
        ("/v1/completions", {"model": "base", "prompt": secret, "max_tokens": 2}),
        ("/v1/completions", {"model": "base", "prompt": ids * 300, "max_tokens": 2}),
        ("/v1/completions", {"model": "base", "prompt": secret, "max_tokens": secret}),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": secret, "content": secret}], "max_tokens": 2}),
        ("/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": secret}]}),
    ]
    statuses = [HTTP.post(server.url + p, json=body, headers=headers).status_code for p, body in asked]
    assert set(statuses) <= {200, 400, 404, 422}, statuses
    assert statuses.count(200) >= 4, statuses
    log = server.log.read_text(errors="replace")
    assert "ready after" in log
    questions = [json.loads(line)["prompt"] for line in task.read_text().splitlines()]
    for what in (TOKEN, "mellifluous", "armadillo", "251, 252", *questions):
        assert what not in log, what
