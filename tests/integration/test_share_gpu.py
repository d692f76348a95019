"""`--share-gpu`: the server sleeps while the learner trains; on a CPU it only waits, and frees no memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from learner.run_dir.files import HISTORY_FILE, read_lines
from learner.servers.client import RolloutClient
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.examples import EXAMPLES, run_example
from tests.integration.support.learner_process import LearnerProcess, write_questions
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import HTTP, ServerProcess, running_server
from tests.integration.support.waiting import Load, outlives, until, with_enough_load


@pytest.fixture(scope="module")
def sharing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(model, tmp_path_factory.mktemp("sharing"), *FLAGS, "--share-gpu") as process:
        yield process


@pytest.fixture
def client(sharing: ServerProcess) -> Iterator[RolloutClient]:
    with RolloutClient(sharing.url) as client:
        yield client
        client.wake()


def test_requests_wait_while_it_sleeps(client: RolloutClient, sharing: ServerProcess, model: Path) -> None:
    policy = P.make_policy(model)
    P.randomize(policy, seed=1)
    P.push(client, policy, "held", 0)
    chat = {"model": "policy", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}

    def sleep_during_generations(load: Load) -> None:
        client.wake()
        with ThreadPoolExecutor() as pool, RolloutClient(sharing.url) as other:
            running = pool.submit(P.generate, other, [PROBE], n=load.n, max_tokens=load.tokens, ignore_eos=True)
            until(lambda: client.run("held").running_requests > 0, running=running)
            outlives(client.sleep().asleep and not running.done())
            decoded = sharing.metrics("vllm:generation_tokens_total")
            later = pool.submit(P.generate, other, [PROBE], n=2, max_tokens=8)
            openai = pool.submit(HTTP.post, f"{sharing.url}/v1/chat/completions", json=chat)
            until(lambda: client.run("held").running_requests == 3)
            assert HTTP.get(f"{sharing.url}/ready").status_code == 200
            assert sharing.metrics("vllm:generation_tokens_total") == decoded
            assert not (running.done())
            assert not (later.done())
            assert not (openai.done())
            assert not client.wake().asleep
            answers = [running.result(), later.result()]
            assert openai.result().status_code == 200
        for answer in answers:
            assert P.largest_gap(policy, answer) < FP32

    with_enough_load(sleep_during_generations)


def test_a_push_wakes_it(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model)
    for step in range(2):
        P.randomize(policy, seed=step)
        assert client.sleep().asleep
        P.push(client, policy, "woken", step)
        assert not client.state().asleep
        assert float((P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max()) < FP32
    client.sleep()
    client.delete_run("woken", P.LEASE)
    state = client.state()
    assert not state.runs, "the end of a run writes nothing"
    assert state.asleep, "the end of a run writes nothing"


def test_a_learner_that_was_killed_in_its_turn_goes_on(client: RolloutClient, model: Path, tmp_path: Path) -> None:
    task = write_questions(tmp_path / "questions.jsonl")
    flags = ["--share_gpu", "true", "--max_steps", "10", "--save_steps", "1", "--steps_per_generation", "2"]
    learner = LearnerProcess(client.url, model, task, tmp_path / "run", *flags)
    until(lambda: learner.steps() >= 2 or learner.process.poll() is not None, 120.0)
    until(lambda: client.state().asleep or learner.process.poll() is not None)
    learner.kill()
    assert learner.steps() < 10, learner.tail()
    again = LearnerProcess(client.url, model, task, tmp_path / "run", *flags)
    summary = again.finish()
    assert summary["steps"] == 10
    assert 0 < summary["max_logprob_gap"] < FP32
    assert not client.state().asleep


def test_the_quickstart_notebook(sharing: ServerProcess, model: Path, tmp_path: Path) -> None:
    """All its cells, but that it finds the server instead of starting one."""
    shown = run_example(
        [sys.executable, "-m", "tests.integration.support.notebook", str(EXAMPLES / "quickstart.ipynb")],
        tmp_path,
        MODEL=model,
        ROLLOUT_URL=sharing.url,
        OUTPUT_DIR=tmp_path / "run",
    )
    assert "policy:" in shown
    assert [row["step"] for row in read_lines(tmp_path / "run" / HISTORY_FILE)] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
