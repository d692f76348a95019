"""Versions served after a push, on every route."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from learner.servers.client import RolloutClient
from shared.weights import WeightVersion
from tests.integration.support import policy as P
from tests.integration.support.policy import FP32
from tests.integration.support.server import ServerProcess
from tests.integration.support.waiting import Load, outlives, until, with_enough_load

PROBE = [5, 17, 99, 260, 41, 33, 270, 8, 120, 64, 7, 300]


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "r": 16},
        {"rank_pattern": {"q_proj": 4, "down_proj": 16}, "alpha_pattern": {"q_proj": 3, "o_proj": 40}},
        {"target_modules": ["q_proj", "up_proj"], "r": 4},
    ],
    ids=["plain", "rslora", "patterns", "subset"],
)
def test_served_logprobs_are_the_learners(client: RolloutClient, model: Path, lora: dict) -> None:
    policy = P.make_policy(model, **lora)
    before = P.score(client, PROBE, policy="base")
    P.randomize(policy, seed=1)
    receipt = P.push(client, policy, "equal-" + "-".join(lora or ["plain"]).replace("_", "-"), step=0)
    after = P.score(client, PROBE)
    assert receipt.workers == 1
    assert receipt.modules == len(P.AdapterExporter(policy, dtype="float32").layers)
    assert (after - P.reference(policy, PROBE)).abs().max() < FP32
    assert (after - before).abs().max() > 0.05
    with policy.disable_adapter():
        assert (before - P.reference(policy, PROBE)).abs().max() < FP32
    for temperature in (1.0, 0.7):
        answer = P.generate(client, [PROBE[:5], PROBE], n=4, max_tokens=24, temperature=temperature)
        assert P.largest_gap(policy, answer, temperature) < FP32


def test_logprobs_are_of_the_truncated_distribution(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model)
    P.randomize(policy, seed=2)
    P.push(client, policy, "truncated", step=0)
    answer = P.generate(client, [PROBE], n=8, max_tokens=1, temperature=0.5, top_k=3)
    top = torch.log_softmax(P.policy_logits(policy, PROBE) / 0.5, -1).topk(3)
    renormalised = dict(zip(top.indices.tolist(), torch.log_softmax(top.values, -1).tolist(), strict=True))
    for completion in answer.groups[0].completions:
        assert completion.logprobs[0] == pytest.approx(renormalised[completion.token_ids[0]], abs=FP32)


def test_push_in_the_middle_of_generations(client: RolloutClient, server: ServerProcess, model: Path) -> None:
    old, new = P.make_policy(model), P.make_policy(model)
    P.randomize(old, seed=3)
    P.randomize(new, seed=4)
    prompts = [[i, *PROBE] for i in range(10, 16)]
    base = client.state().base.weights

    def push_during_generations(load: Load) -> None:
        run_id = f"middle-{load.n}-{load.tokens}"
        P.push(client, old, run_id, step=0)
        blob = P.blob(new, WeightVersion(run_id=run_id, step=1), base)
        with ThreadPoolExecutor() as pool, RolloutClient(server.url) as other:
            running = pool.submit(P.generate, other, prompts, n=load.n, max_tokens=load.tokens, ignore_eos=True)
            until(lambda: client.run(run_id).running_requests > 0, running=running)
            receipt = client.push(run_id, [blob], P.LEASE)
            outlives(client.run(run_id).running_requests)
            later = P.generate(client, prompts, max_tokens=24)
            outlives(not running.done())
            first = running.result()
        assert receipt.wait_seconds < 5.0, "a push takes a free slot, and no request is waited for"
        _check_spans(first, WeightVersion(run_id=run_id, step=0))
        _check_spans(later, receipt.version)
        assert P.largest_gap(old, first) < FP32
        assert P.largest_gap(new, later) < FP32
        assert P.largest_gap(new, first) > 0.05

    with_enough_load(push_during_generations)


def test_no_stale_answer_over_twenty_pushes(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model)
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog, " * 8}]
    prompt = P.chat_token_ids(model, messages)
    for step in range(20):
        P.randomize(policy, seed=100 + step)
        P.push(client, policy, "twenty", step=step)
        for _ in range(2):  # the second one hits the prefix cache of this very version
            answer = P.generate(client, [prompt], max_tokens=8)
            assert P.largest_gap(policy, answer) < FP32
            gap = P.chat_gap(client, policy, prompt, messages)
            assert gap < FP32, f"stale answer of /v1/chat/completions at step {step}: {gap}"
    base = P.generate(client, [prompt], policy="base", max_tokens=8)
    with policy.disable_adapter():
        assert P.largest_gap(policy, base) < FP32


def test_a_push_while_decoding_does_not_stop_it(client: RolloutClient, server: ServerProcess, model: Path) -> None:
    """Many pushes under load: every completion has exactly the version that its span names."""
    policies = {step: P.make_policy(model) for step in range(6)}
    for step, policy in policies.items():
        P.randomize(policy, seed=200 + step)
    P.push(client, policies[0], "load", step=0)
    stop, answers = threading.Event(), []

    def sample() -> None:
        with RolloutClient(server.url) as own:
            while not stop.is_set():
                answers.append(P.generate(own, [PROBE], n=4, max_tokens=16))

    with ThreadPoolExecutor() as pool:
        samplers = [pool.submit(sample) for _ in range(3)]
        for step in range(1, 6):
            time.sleep(0.3)
            P.push(client, policies[step], "load", step=step)
        stop.set()
        for sampler in samplers:
            sampler.result()
    seen = set()
    for answer in answers:
        version = answer.groups[0].completions[0].spans[0].version
        assert version is not None
        seen.add(version.step)
        _check_spans(answer, version)
        assert P.largest_gap(policies[version.step], answer) < FP32
    assert len(seen) >= 4, f"the load must have met several versions, met {seen}"


def _check_spans(answer: P.GenerateResponse, version: WeightVersion) -> None:
    for group in answer.groups:
        for completion in group.completions:
            assert len(completion.logprobs) == len(completion.token_ids)
            assert [(s.version, s.start, s.end, s.kv) for s in completion.spans] == [
                (version, 0, len(completion.token_ids), "fresh")
            ]
