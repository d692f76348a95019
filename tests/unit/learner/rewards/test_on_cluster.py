"""Reward workers on a Ray cluster keep the contract of those on this machine; over a Ray that only pretends."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from learner.cluster import connection, workers
from learner.rewards import pool as pools
from learner.rewards import worker
from learner.rewards.calls import RewardCall
from learner.rewards.on_cluster import workers_on_cluster
from learner.rewards.pool import RewardPool
from learner.rewards.scorer import Rewards
from shared.errors import InvalidRequest, LockstepError
from tests.support.fake_ray import ActorDiedError, FakeRay, GetTimeoutError


def lengths(completions, log_metric, trainer_state, **_):
    log_metric("step", trainer_state.global_step)
    return [float(len(completion)) for completion in completions]


def raising(completions, **_):
    raise KeyError("the user's own")


FUNCTIONS = {0: ("lengths", lengths), 1: ("raising", raising)}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A cluster on which a completion that hangs exceeds the limit, and one that dies ends its worker."""
    fake = FakeRay(**{"10_0_0_1": {"CPU": 2.0, "sandbox": 1.0}})

    def before(actor: Any, method: str, args: Any) -> None:
        if method == "call" and args[0] is worker.score:
            completions = pickle.loads(args[3])["completions"]  # noqa: S301 - of this test
            if "hangs" in completions:
                raise GetTimeoutError
            if "dies" in completions:
                raise ActorDiedError

    fake.before = before
    monkeypatch.setattr(workers, "connect", lambda: fake)
    monkeypatch.setattr(pools, "_LOOK_S", 0.01)
    monkeypatch.setattr(workers, "_RETRY_S", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "of the test")
    return fake


@pytest.fixture
def make_pool(ray: FakeRay) -> Iterator[Callable[..., RewardPool]]:
    made: list[RewardPool] = []

    def make(functions: Any = FUNCTIONS, count: int = 2, **needs: float) -> RewardPool:
        made.append(RewardPool(functions, workers=count, timeout_s=5.0, make_workers=workers_on_cluster(needs)))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def group(*completions: str) -> RewardCall:
    rows = {"prompts": ["p"] * len(completions), "completions": list(completions)}
    return RewardCall(rows, SimpleNamespace(global_step=7))


def test_a_group_is_one_call(make_pool: Callable[..., RewardPool]) -> None:
    pool = make_pool()
    [(rows, result)] = pool.wait(pool.submit(0, group("a", "", "ccc")))
    assert (rows, result.rewards, result.metrics) == (3, [1.0, 0.0, 3.0], [("step", 7.0)])


@pytest.mark.parametrize("bad", ["hangs", "dies"])
def test_one_bad_sample_costs_the_others_nothing(make_pool: Callable[..., RewardPool], bad: str) -> None:
    pool = make_pool()
    outcomes = [pool.submit(0, group("a", bad, "ccc")), pool.submit(0, group("dddd")), pool.submit(0, group(bad))]
    parts = [[result and result.rewards for _, result in pool.wait(outcome)] for outcome in outcomes]
    assert parts == [[[1.0], None, [3.0]], [[4.0]], [None]]


def test_they_are_counted_and_said_as_ever(make_pool: Callable[..., RewardPool], caplog) -> None:
    rewards = Rewards(make_pool(), 2, batch=lambda: 0, weights=lambda: [1.0], early_call=None)
    call = group("a", "hangs", "ccc", "dies")
    collected = rewards.collect(0, call, lambda *_: None, lambda *_: None, batch=0, group_size=2)
    assert collected == [1.0, None, 3.0, None]
    assert rewards.unscored == {"lengths": 2}
    [warning] = caplog.messages
    assert "the reward lengths gave 1 sample(s) no reward within 5 s each" in warning or "2 sample(s)" in warning


def test_an_exception_comes_with_its_traceback(make_pool: Callable[..., RewardPool]) -> None:
    pool = make_pool()
    [(_, result)] = pool.wait(pool.submit(1, group("a")))
    assert "the user's own" in result.error
    assert "in raising" in result.error


def test_functions_that_a_node_cannot_import_are_left_out(
    make_pool: Callable[..., RewardPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    (tmp_path / "at_home.py").write_text("def one(completions, **_):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from at_home import one  # type: ignore[import-not-found]

    load = worker.load

    def on_a_node(blobs: dict[int, bytes]) -> None:
        load({index: blob.replace(b"at_home", b"no_such") for index, blob in blobs.items()})

    monkeypatch.setattr(worker, "load", on_a_node)
    assert make_pool({0: ("lengths", lengths), 5: ("one", one)}).names == {0: "lengths"}
    [warning] = caplog.messages
    assert "the reward one runs on the training thread" in warning
    assert "No module named 'no_such'" in warning


def test_workers_that_cannot_start_are_one_line(
    make_pool: Callable[..., RewardPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(blobs: Any) -> None:
        raise ImportError("lockstep is not installed")

    monkeypatch.setattr(worker, "load", load)
    with pytest.raises(LockstepError, match=r"reward workers do not start .*lockstep is not installed") as caught:
        make_pool()
    assert "\n" not in caught.value.message


def test_a_cluster_without_room_is_one_line(
    ray: FakeRay, make_pool: Callable[..., RewardPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(actor: Any, method: str, args: Any) -> None:
        raise GetTimeoutError

    ray.before = full
    monkeypatch.setattr(pools, "START_S", 0.05)
    with pytest.raises(LockstepError, match=r"do not start .*0 of 2 run on the Ray cluster, on 1 CPU each"):
        make_pool()


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"CPU": 3}, r"^reward_backend ray: a reward worker needs 3 CPUs, and no node .*10\.0\.0\.1 with 2 CPUs \["),
        ({"sandbox": 2}, r"a reward worker needs 1 CPU and 2 sandbox, and no node .* with 2 CPUs and 1 sandbox \["),
    ],
)
def test_what_no_node_has_is_refused(make_pool: Callable[..., RewardPool], needs: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        make_pool(**needs)


def test_no_ray_and_no_cluster_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(connection, "import_ray", lambda: SimpleNamespace(is_initialized=lambda: False))
    with pytest.raises(InvalidRequest, match=r"^reward_backend ray: no Ray cluster at 127\.0\.0\.1:9: "):
        workers_on_cluster({})

    def missing() -> None:
        raise InvalidRequest("Ray is not installed here")

    monkeypatch.setattr(connection, "import_ray", missing)
    with pytest.raises(InvalidRequest, match=r"^reward_backend ray: Ray is not installed here"):
        workers_on_cluster({})


def test_nothing_of_the_learners_environment_is_sent(
    ray: FakeRay, make_pool: Callable[..., RewardPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_TOKEN", "only-the-learner-knows-it")
    pool, sent = make_pool(), []
    before = ray.before
    ray.before = lambda *call: (sent.append(call[2]), before(*call))[1]
    pool.wait(pool.submit(0, group("a")))
    assert sent
    assert b"only-the-learner-knows-it" not in cloudpickle.dumps([ray.stored, sent, ray.options])


@pytest.mark.parametrize(("gpus", "seen"), [(0, ""), (1, "of the test")])
def test_only_workers_with_a_gpu_see_one(
    ray: FakeRay, make_pool: Callable[..., RewardPool], gpus: int, seen: str
) -> None:
    ray.has["10.0.0.1"]["GPU"] = 1.0
    make_pool(GPU=gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_resources_that_no_actor_can_ask_for_are_refused(ray: FakeRay) -> None:
    with pytest.raises(InvalidRequest, match="object_store_memory is Ray's own"):
        workers_on_cluster({"object_store_memory": 1e9})
