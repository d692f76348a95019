"""The server as a process: start, refusals at start, a clean stop, a dead engine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rollout_server import cli
from shared.errors import LockstepError
from tests.integration.conftest import FLAGS
from tests.integration.support.forked import FORKING
from tests.integration.support.server import HTTP, ServerProcess
from tests.integration.support.waiting import until

REFUSED = {
    "speculation": (
        ["--speculative-config", '{"method":"ngram","num_speculative_tokens":2,"prompt_lookup_max":3}'],
        "--allow-policy-altering",
    ),
    "kv-cache": (["--kv-cache-dtype", "fp8_e5m2"], "--allow-policy-altering"),
    "logprobs": (["--logprobs-mode", "raw_logprobs"], "processed_logprobs"),
    "lora-modules": (["--lora-modules", "other=/nowhere"], "--lora-modules"),
    "slots": (["--slots-per-run", "1"], "--slots-per-run"),
    "pipeline": (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
    "engines-elsewhere": (["--data-parallel-size", "4", "--data-parallel-size-local", "2"], "2 of 4 data-parallel"),
    "hybrid": (
        ["--data-parallel-size", "4", "--data-parallel-size-local", "2", "--data-parallel-hybrid-lb"],
        "2 of 4 data-parallel",
    ),
    "deterministic-engines": (["--data-parallel-size", "2", "--deterministic"], "--deterministic"),
    "deterministic-cache": (["--enable-prefix-caching", "--deterministic"], "prefix cache"),
    "beyond-loopback": (["--host", "0.0.0.0"], "--token-file"),
    "beyond-loopback-v6": (["--host", "::"], "--allow-unauthenticated"),
    "api-key": (["--api-key", "secret"], "--token-file"),
    "prompt-embeds": (["--enable-prompt-embeds"], "--enable-prompt-embeds"),
    "unix-socket": (["--uds", "/nowhere/socket"], "--uds"),
    "shared-runs": (["--share-gpu", "--max-runs", "2"], "--max-runs"),
    "shared-base": (["--share-gpu", "--apply", "merge", "--keep-base", "device"], "--keep-base"),
    "shared-engines": (["--share-gpu", "--data-parallel-size", "2"], "--share-gpu"),
    "hosts-unknown": (["--tensor-parallel-size", "2", "--nnodes", "2"], "--master-addr"),
    "hosts-without-token": (
        ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"],
        "give all of them the same --token-file",
    ),
    "hosts-alone": (["--node-rank", "1"], "--nnodes"),
    "headless": (["--headless"], "--headless"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start(model: Path, case: str) -> None:
    flags, word = REFUSED[case]
    with pytest.raises((LockstepError, ValueError), match=re.escape(word)):
        cli.resolve([str(model), *FLAGS, *flags])


def test_a_model_without_lora_is_refused_at_start(model: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=512, n_positions=256, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LockstepError, match="cannot serve a GPT2LMHeadModel with LoRA"):
        cli.resolve([str(tmp_path / "gpt2"), "--max-model-len", "256"])


def test_the_reason_of_a_failed_start_is_the_last_line(model: Path, tmp_path: Path) -> None:
    """A weight that is missing is found in the engine's process."""
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "other" / "model.safetensors")
    server = ServerProcess(tmp_path / "other", tmp_path / "log", *FLAGS)
    try:
        assert server.wait_started() == 1
    finally:
        server.stop()
    last = server.tail().splitlines()[-1]
    assert last.startswith("rollout-server: vLLM could not start the engine: ")
    assert "see root cause" not in last.lower()


def test_sigterm_lets_running_requests_finish_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    server = ServerProcess(model, tmp_path / "log", *FLAGS, forked=False)
    try:
        alive_before_ready = False
        while httpx_status(server.url + "/ready") != 200:
            assert server.process.poll() is None, server.tail()
            alive_before_ready |= httpx_status(server.url + "/health") == 200
            time.sleep(0.2)
        assert alive_before_ready, "/health must answer while the model loads"
        body = {
            "prompts": [{"token_ids": [5, 6, 7]}],
            "policy": "base",
            "sampling": {"n": 32, "max_tokens": 200, "ignore_eos": True},
        }
        with ThreadPoolExecutor() as pool:
            with server.frozen_engine():
                running = pool.submit(HTTP.post, server.url + "/v1/generate", json=body, timeout=120)
                until(lambda: server.metric("lockstep_sequences") == 32)
                server.process.send_signal(signal.SIGTERM)
                until(lambda: httpx_status(server.url + "/ready") != 200)
                assert httpx_status(server.url + "/ready") == 503
                assert httpx_status(server.url + "/health") == 200
                assert HTTP.get(server.url + "/v1/state").json()["draining"] is True
                pushed = HTTP.put(server.url + "/v1/runs/r/adapter", content=b"", headers={"Lockstep-Lease": "a" * 8})
                for refused in (HTTP.post(server.url + "/v1/generate", json=body), pushed):
                    assert refused.status_code == 503
                    assert refused.json()["error"]["code"] == "draining"
                    assert refused.headers["Retry-After"]
                assert HTTP.post(server.url + "/v1/drain").status_code == 202
                assert not running.done()
            answer = running.result()
        (group,) = answer.json()["groups"]
        assert [len(completion["token_ids"]) for completion in group["completions"]] == [200] * 32
        assert server.process.wait(60) == 0, server.tail()
        _nothing_left(server)
    finally:
        server.stop()


def test_a_dead_engine_ends_the_server_with_a_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", FORKING)
    # Not forked itself: the tracker of shared memory has to end with the server.
    server = ServerProcess(model, tmp_path / "log", *FLAGS, forked=False)
    try:
        server.wait_ready()
        body = {
            "prompts": [{"token_ids": [5, 6, 7]}],
            "policy": "base",
            "sampling": {"n": 32, "max_tokens": 200, "ignore_eos": True},
        }
        their_body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 200, "n": 8, "ignore_eos": True}
        with ThreadPoolExecutor() as pool:
            with server.frozen_engine():
                ours = pool.submit(HTTP.post, server.url + "/v1/generate", json=body)
                theirs = pool.submit(HTTP.post, server.url + "/v1/completions", json=their_body)
                until(lambda: server.metric("lockstep_sequences") == 40)
                shared_memory = _shared_memory(server)
                assert shared_memory, "between the engine and its worker"
                killed = time.monotonic()
                for pid in _group(server):
                    if "EngineCor" in Path(f"/proc/{pid}/comm").read_text():
                        os.kill(pid, signal.SIGKILL)
            assert ours.result().status_code == 503
            assert ours.result().json()["error"]["code"] == "engine_dead"
            assert theirs.result().status_code == 503
        for path in ("/health", "/ready", "/v1/state"):
            assert httpx_status(server.url + path) in (503, 0)
        assert server.process.wait(60) == 1
        assert time.monotonic() - killed < 45
        assert "engine died" in server.tail()
        _nothing_left(server)
        assert not shared_memory & set(os.listdir("/dev/shm"))
    finally:
        server.stop()


def test_a_killed_server_without_a_compiler_leaves_no_engine_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    server = ServerProcess(model, tmp_path / "log", *FLAGS)
    try:
        server.wait_ready()
        assert "without torch.compile" in server.log.read_text()
        server.process.kill()
        server.process.wait()
        _nothing_left(server)
    finally:
        server.stop()


def httpx_status(url: str) -> int:
    try:
        return HTTP.get(url, timeout=10).status_code
    except httpx.TransportError:
        return 0


def _shared_memory(server: ServerProcess) -> set[str]:
    """Return shared memory segments that a process of the server has mapped or opened."""
    names = os.listdir("/dev/shm")
    used: set[str] = set()
    for pid in _group(server):
        process = Path(f"/proc/{pid}")
        opened = [os.path.realpath(link) for link in (process / "fd").iterdir()]
        mapped = (process / "maps").read_text()
        used.update(name for name in names if f"/dev/shm/{name}" in opened or f"/dev/shm/{name}" in mapped)
    return used


def _group(server: ServerProcess) -> list[int]:
    """Return living processes of the server's session."""
    listed = subprocess.run(["ps", "-s", str(server.process.pid), "-o", "pid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def _nothing_left(server: ServerProcess) -> None:
    deadline = time.monotonic() + 20
    while _group(server):
        assert time.monotonic() < deadline, f"left behind: {_group(server)}"
        time.sleep(0.2)
