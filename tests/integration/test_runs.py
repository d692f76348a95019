"""Several runs on one server, and a thousand pushes: runs and versions do not affect each other."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from learner.cli import main
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import GenerateRequest, Prompt
from shared.sampling import SamplingParams
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import ServerProcess, running_server
from tests.support.arguments import arguments


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for two runs."""
    with running_server(model, tmp_path_factory.mktemp("server"), *FLAGS, "--max-runs", "2") as process:
        yield process


def _publisher(client: RolloutClient, policy, run_id: str, **options) -> Publisher:
    return Publisher(ServerPool.of(client), policy, Lease(run_id, f"secret-of-{run_id}", 0), **options)


def test_a_run_that_computes_nan_leaves_nothing_of_it_to_others(server: ServerProcess, model: Path) -> None:
    """Others get its blocks of the KV cache."""
    policy = P.make_policy(model)
    P.randomize(policy, seed=1, scale=1e18)
    prompts = [Prompt(token_ids=list(range(5 + i, 45 + i))) for i in range(16)]

    def finite(policy: str, run_id: str | None = None) -> int:
        sampling = SamplingParams(n=3, max_tokens=60, ignore_eos=True)
        request = GenerateRequest(prompts=prompts, sampling=sampling, policy=policy, run_id=run_id)
        found = [completion for group in client.generate(request).groups for completion in group.completions]
        return sum(logprob is not None for completion in found for logprob in completion.logprobs)

    with RolloutClient(server.url) as client:
        P.push(client, policy, "diverged", step=0)
        assert finite("latest", "diverged") == 0
        assert finite("base") == 16 * 3 * 60
        client.delete_run("diverged", P.LEASE)


def test_two_learners_at_once_do_not_touch_each_others_tokens(server: ServerProcess, model: Path) -> None:
    """Two threads push different adapters, one by broadcast and one over HTTP, with in_flight keep on one of them."""
    steps = 8
    failures: list[str] = []

    # Loaded one after the other: transformers patches its classes for the duration of a load.
    policies = {run_id: P.make_policy(model) for run_id in ("one", "two")}

    def learn(run_id: str, seed: int, **options) -> None:
        with RolloutClient(server.url) as client:
            policy = policies[run_id]
            publisher = _publisher(client, policy, run_id, **options)
            for step in range(steps):
                P.randomize(policy, seed=seed + step)
                receipt = publisher.push(step)
                request = GenerateRequest(
                    prompts=[Prompt(token_ids=[seed % 500, *PROBE])],
                    run_id=run_id,
                    sampling=SamplingParams(n=2, max_tokens=24, ignore_eos=True),
                )
                answer = client.generate(request)
                spans = [span.version for group in answer.groups for c in group.completions for span in c.spans]
                if set(spans) != {receipt.version}:
                    failures.append(f"{run_id} step {step}: {spans}")
                if (gap := P.largest_gap(policy, answer)) > FP32:
                    failures.append(f"{run_id} step {step}: gap {gap}")
            publisher.close()

    with ThreadPoolExecutor() as pool:
        one = pool.submit(learn, "one", 1000, transport="collective", in_flight="keep")
        two = pool.submit(learn, "two", 2000, transport="http")
        one.result()
        two.result()
    assert not failures
    with RolloutClient(server.url) as client:
        assert {run.run_id for run in client.state().runs} == {"one", "two"}
        for run_id in ("one", "two"):
            assert sorted(slot["state"] for slot in client.run(run_id).slots) == ["active", "free"]
        with pytest.raises(LockstepError) as full:
            _publisher(client, P.make_policy(model), "three").push(0)
        assert full.value.code is ErrorCode.NO_FREE_RUN
        ended = client.run("one").version
        assert ended is not None
        client.finish_run(ended, "secret-of-one")
        assert client.run("one").version == ended, "it is served until its place is needed"
        assert _publisher(client, P.make_policy(model), "three").push(0).version.run_id == "three"
        assert {run.run_id for run in client.state().runs} == {"two", "three"}
        client.delete_run("three", "secret-of-three")
        client.delete_run("two", "secret-of-two")


def test_eval_of_stored_adapters_beside_a_training(
    server: ServerProcess, client: RolloutClient, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluate base, the run's policy, and two adapters from disk; then without free slots for them."""
    task = tmp_path / "questions.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"the quick brown fox {i}"}) + "\n" for i in range(16)))
    for seed, name in ((31, "one"), (32, "two")):
        policy = P.make_policy(model, use_rslora=seed == 32)
        P.randomize(policy, seed=seed)
        policy.save_pretrained(tmp_path / name)
    publisher = _publisher(client, policy, "training")
    publisher.push(7)
    flags = [
        "eval",
        *arguments(
            {
                "--rollout-url": server.url,
                "--task": task,
                "--run-id": "training",
                "--eval-size": 8,
                "--reward-funcs": "tests.support.rewards:reward_odd",
                "--max-tokens": 8,
                "--json": tmp_path / "eval.json",
                "--policy": None,
            }
        ),
    ]
    assert main([*flags, "base", "latest", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    base, latest, one, two = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert latest["versions"] == ["training@0.7"]
    assert one["versions"] != two["versions"]
    texts = [[row["completion"] for row in result["rows"]] for result in (base, latest, one, two)]
    assert texts[1] == texts[3], "the same adapter, pushed by its learner and from disk"
    assert texts[0] != texts[1] != texts[2] != texts[0]
    assert [run.run_id for run in client.state().runs] == ["training"]

    other = _publisher(client, policy, "other")
    other.push(0)
    assert main([*flags, str(tmp_path / "one")]) == 1
    assert "--max-runs" in capsys.readouterr().err
    for ended in (publisher, other):
        ended.delete_run()


@pytest.mark.timeout(900)
def test_a_thousand_pushes_leave_nothing_behind(server: ServerProcess, client: RolloutClient, model: Path) -> None:
    """Constant memory on both sides, no stale response, no slot or pause left; every fourth push over HTTP."""
    policy = P.make_policy(model)
    broadcast = _publisher(client, policy, "many", transport="collective")
    over_http = _publisher(client, policy, "many", transport="http")
    b = [parameter for name, parameter in policy.named_parameters() if "lora_B" in name]
    stop, failures = threading.Event(), []

    def sample() -> None:
        with RolloutClient(server.url) as own:
            while not stop.is_set():
                answer = P.generate(own, [PROBE], max_tokens=6)
                spans = answer.groups[0].completions[0].spans
                if len(spans) != 1:
                    failures.append(str(spans))
                stop.wait(0.05)  # a load, not a saturation: there is one pair of cores for both sides and the sampler

    def memory() -> list[float]:
        processes = [psutil.Process(server.process.pid), *map(psutil.Process, server.engine_processes())]
        return [process.memory_info().rss / 2**20 for process in (*processes, psutil.Process())]

    broadcast.push(0)
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        for step in range(1, 1001):
            with torch.no_grad():
                torch._foreach_mul_(b, -1.01 if step % 100 else 1.01**-99)
            (over_http if step % 4 == 0 else broadcast).push(step)
            if step % 50 == 0:
                gap = (P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max()
                assert gap < FP32, f"stale or wrong answer at step {step}"
            if step == 200:
                before = memory()
    finally:
        stop.set()
        sampler.join()
    grown = [after - then for after, then in zip(memory(), before, strict=True)]
    assert not failures
    assert max(grown) < 30, f"MiB grown over 800 pushes, by process: {grown}"
    assert sorted(slot["state"] for slot in client.run("many").slots) == ["active", "free"]
    transports = {receipt.transport for receipt in broadcast.receipts[1:]}
    assert transports == {"collective"}
    broadcast.close()
    client.delete_run("many", "secret-of-many")
