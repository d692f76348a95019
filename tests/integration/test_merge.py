"""`--apply merge`: the adapter is added to the live weights, and the base can be restored exactly."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.sync.canary import prove_modules
from learner.sync.proof import SyncProof
from shared.errors import ErrorCode, LockstepError
from shared.weights import WeightVersion
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.in_flight import check_every_span, generate_across_pushes
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import HTTP, ServerProcess, running_server
from tests.integration.support.waiting import Load, outlives, until, with_enough_load


@pytest.fixture(scope="module")
def merging(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(model, tmp_path_factory.mktemp("merging"), *FLAGS, "--apply", "merge") as process:
        yield process


@pytest.fixture
def client(merging: ServerProcess) -> Iterator[RolloutClient]:
    """The base is served before and after each test."""
    with RolloutClient(merging.url) as client:
        yield client
        for run in client.state().runs:
            client.delete_run(run.run_id, P.LEASE)


def _policy(model: Path, seed: int, **lora) -> object:
    policy = P.make_policy(model, **lora)
    P.randomize(policy, seed=seed)
    return policy


def _gap(client: RolloutClient, policy, **kwargs) -> float:
    return float((P.score(client, PROBE, **kwargs) - P.reference(policy, PROBE)).abs().max())


def _chat(client: RolloutClient, name: str) -> httpx.Response:
    body = {"model": name, "messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}
    return HTTP.post(f"{client.url}/v1/chat/completions", json=body)


def test_many_pushes_then_the_base_to_the_bit(client: RolloutClient, model: Path) -> None:
    state = client.state()
    assert state.apply == "merge"
    assert state.lora_dtype == state.dtype == "float32"
    policy = P.make_policy(model)
    base = P.score(client, PROBE, policy="base")
    with policy.disable_adapter():
        assert float((base - P.reference(policy, PROBE)).abs().max()) < FP32
    gaps = []
    for step in range(50):
        P.randomize(policy, seed=step, scale=0.3 if step % 2 else 0.1)
        receipt = P.push(client, policy, "many", step)
        assert receipt.modules == 14
        assert receipt.workers == 1
        gaps.append(_gap(client, policy))
    assert max(gaps) < FP32, gaps
    assert P.largest_gap(policy, P.generate(client, [PROBE], n=2, max_tokens=40)) < FP32
    client.delete_run("many", P.LEASE)
    again = P.score(client, PROBE, policy="base")
    assert torch.equal(base, again), (base - again).abs().max()


def test_the_learners_proof_and_its_canary(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model)
    proof = SyncProof(ServerPool.of(client), policy, [PROBE])
    result = prove_modules(proof, lambda step: P.push(client, policy, "proven.canary", step).version)
    client.delete_run("proven.canary", P.LEASE)
    assert abs(result.slope - 1) < 0.01
    assert result.proven == result.modules
    proof.check_base()
    for step in range(2):
        assert proof.check(P.push(client, policy, "proven", step).version).max_mismatch < FP32
        P.randomize(policy, seed=60 + step)


def test_adapters_of_different_modules_one_after_another(client: RolloutClient, model: Path) -> None:
    targets = [["q_proj", "down_proj"], ["v_proj", "gate_proj"], ["o_proj"], P.TARGETS, ["k_proj", "up_proj"]]
    for step, modules in enumerate(targets):
        policy = _policy(model, 70 + step, target_modules=modules, r=4 + step)
        P.push(client, policy, "different", step)
        assert _gap(client, policy) < FP32, modules


def test_no_base_while_a_run_lives(client: RolloutClient, model: Path) -> None:
    assert _chat(client, "base").status_code == 200
    policy = _policy(model, 80)
    P.push(client, policy, "only", 0)
    with pytest.raises(LockstepError) as refusal:
        P.score(client, PROBE, policy="base")
    assert refusal.value.code is ErrorCode.BASE_NOT_SERVED
    answer = _chat(client, "base")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "base_not_served"
    messages = [{"role": "user", "content": "Tell me about the fox."}]
    prompt = P.chat_token_ids(model, messages)
    assert P.chat_gap(client, policy, prompt, messages) < FP32
    assert _chat(client, "policy:only").status_code == 200
    client.delete_run("only", P.LEASE)
    assert _chat(client, "base").status_code == 200
    assert _chat(client, "policy").status_code == 404


def test_a_run_that_takes_the_place_of_another(client: RolloutClient, model: Path) -> None:
    base = P.score(client, PROBE, policy="base")
    P.push(client, _policy(model, 90), "first", 0)
    second = _policy(model, 91, target_modules=["q_proj"])
    P.push(client, second, "second", 0)
    assert [run.run_id for run in client.state().runs] == ["second"]
    assert _gap(client, second) < FP32
    client.delete_run("second", P.LEASE)
    assert torch.equal(base, P.score(client, PROBE, policy="base"))


def test_a_bad_push_changes_nothing(client: RolloutClient, model: Path) -> None:
    policy = _policy(model, 100)
    P.push(client, policy, "bad", 0)
    before = P.score(client, PROBE)
    version = WeightVersion(run_id="bad", fence=0, step=1)
    altered = bytearray(P.blob(_policy(model, 101), version, client.state().base.weights))
    altered[-1] ^= 1
    with pytest.raises(LockstepError) as refusal:
        client.push("bad", [bytes(altered)], P.LEASE)
    assert refusal.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert torch.equal(before, P.score(client, PROBE))
    P.push(client, policy, "bad", 2)
    assert _gap(client, policy) < FP32


def test_drain_waits_and_later_requests_queue(client: RolloutClient, merging: ServerProcess, model: Path) -> None:
    old, new = _policy(model, 110), _policy(model, 111)
    base = client.state().base.weights

    def push_during_generations(load: Load) -> None:
        run_id = f"drained-{load.n}-{load.tokens}"
        P.push(client, old, run_id, 0)
        blob = P.blob(new, WeightVersion(run_id=run_id, fence=0, step=1), base)
        with ThreadPoolExecutor() as pool, RolloutClient(merging.url) as other:
            running = pool.submit(P.generate, other, [PROBE], n=load.n, max_tokens=load.tokens, ignore_eos=True)
            until(lambda: client.run(run_id).running_requests > 0, running=running)
            receipt = client.push(run_id, [blob], P.LEASE)
            answer = running.result()
        outlives(receipt.wait_seconds > 0)
        assert {span.version.step for group in answer.groups for c in group.completions for span in c.spans} == {0}
        assert P.largest_gap(old, answer) < FP32
        assert _gap(client, new) < FP32

    with_enough_load(push_during_generations)


@pytest.mark.parametrize("in_flight", ["keep", "carried"])
def test_running_requests_generate_across_pushes(
    client: RolloutClient, merging: ServerProcess, model: Path, in_flight
) -> None:
    policies = [_policy(model, 120 + step) for step in range(3)]
    check_every_span(generate_across_pushes(client, merging, policies, in_flight), policies, in_flight)
