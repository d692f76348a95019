"""A pool of actors that call functions: limits, deaths, replacements and room; over a Ray that only pretends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest

from learner.cluster import workers
from learner.cluster.workers import WorkerDied, WorkerPool
from shared.errors import InvalidRequest, NotReady
from tests.support.fake_ray import ActorDiedError, FakeRay, GetTimeoutError, RayTaskError

LONG_S = 300.0


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay(**{"10_0_0_1": {"CPU": 2.0}})


@pytest.fixture
def make_pool(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerPool]]:
    monkeypatch.setattr(workers, "_RETRY_S", 0.01)
    monkeypatch.setattr(workers, "_LOOK_S", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "of the test")
    made: list[WorkerPool] = []

    def make(count: int = 1, needs: dict[str, float] | None = None, prepare: Any = dict) -> WorkerPool:
        made.append(WorkerPool(ray, count, needs or {"CPU": 1.0}, prepare))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def until(holds: Callable[[], object]) -> None:
    while not holds():
        threading.Event().wait(0.002)


def raises(error: Exception) -> Callable[[], None]:
    """Return a function whose call ends with an error of Ray's."""

    def function() -> None:
        raise error

    return function


def test_every_call_has_its_own_outcome(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(3)
    outcomes = [pool.schedule(divmod, (number, 7), 1.0) for number in range(50)]
    assert [outcome.result(LONG_S) for outcome in outcomes] == [divmod(number, 7) for number in range(50)]


@pytest.mark.parametrize(
    ("error", "expected"), [(GetTimeoutError(), TimeoutError), (ActorDiedError("it ran\nout of memory"), WorkerDied)]
)
def test_a_call_that_hangs_or_dies_fails_alone_and_its_actor_is_replaced(
    ray: FakeRay, make_pool: Callable[..., WorkerPool], error: Exception, expected: type[Exception]
) -> None:
    pool = make_pool()
    bad, good = pool.schedule(raises(error), (), 0.5), pool.schedule(abs, (-3,), 0.5)
    with pytest.raises(expected, match="0.5 s" if expected is TimeoutError else "^out of memory$"):
        bad.result(LONG_S)
    assert good.result(LONG_S) == 3
    assert ray.killed == [ray.workers[0]]
    assert len(ray.workers) == 2


def test_what_a_function_raises_is_its_outcome_and_its_actor_goes_on(
    ray: FakeRay, make_pool: Callable[..., WorkerPool]
) -> None:
    pool = make_pool()
    with pytest.raises(RayTaskError, match="no such answer"):
        pool.schedule(raises(RayTaskError("no such answer")), (), 1.0).result(LONG_S)
    assert pool.schedule(abs, (-3,), 1.0).result(LONG_S) == 3
    assert len(ray.workers) == 1


def test_a_call_is_not_given_to_an_actor_that_was_lost_while_idle(
    ray: FakeRay, make_pool: Callable[..., WorkerPool]
) -> None:
    pool = make_pool(2)
    until(lambda: pool.describe().startswith("2 of 2"))
    lost = list(ray.workers)

    def before(actor: Any, method: str, args: Any) -> None:
        if actor in lost:
            raise ActorDiedError("its node is gone")

    ray.before = before
    outcomes = [pool.schedule(abs, (-number,), 1.0) for number in range(20)]
    assert [outcome.result(LONG_S) for outcome in outcomes] == list(range(20))


def test_a_pool_that_cannot_start_says_so(ray: FakeRay, make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(2, prepare=raises(ImportError("no module called verifier")))
    until(lambda: not pool.active)
    assert pool.describe().startswith("0 of 2 run on the Ray cluster, on 1 CPU each")
    assert pool.describe().endswith("; the last problem: no module called verifier")


def test_it_works_with_those_that_the_cluster_has_room_for(ray: FakeRay, make_pool: Callable[..., WorkerPool]) -> None:
    def before(actor: Any, method: str, args: Any) -> None:
        if actor is not ray.workers[0]:
            raise GetTimeoutError

    ray.before = before
    pool = make_pool(3)
    assert pool.schedule(abs, (-3,), 1.0).result(LONG_S) == 3
    assert pool.active
    assert pool.describe().startswith("1 of 3 run")


def test_what_each_is_given(ray: FakeRay, make_pool: Callable[..., WorkerPool]) -> None:
    make_pool(1, {"CPU": 4.0, "GPU": 1.0, "sandbox": 2.0}).schedule(abs, (-3,), 1.0).result(LONG_S)
    [options] = ray.options
    assert (options["num_cpus"], options["num_gpus"], options["resources"]) == (4.0, 1.0, {"sandbox": 2.0})
    assert options["max_restarts"] == 0
    assert options["scheduling_strategy"] == "SPREAD"


def test_a_closed_pool_ends_its_actors_and_starts_none(ray: FakeRay, make_pool: Callable[..., WorkerPool]) -> None:
    began, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        goes_on.wait()
        raise ActorDiedError("killed")

    pool = make_pool(1)
    running, waiting = pool.schedule(hang, (), 600.0), pool.schedule(abs, (-3,), 600.0)
    began.wait()
    pool.close()
    assert ray.killed == ray.workers
    goes_on.set()
    assert not wait([running, waiting], 0.05).done, "whoever closed it knows that they are lost"
    assert len(ray.workers) == 1


def test_no_cluster_is_begun_where_the_connection_has_ended(ray: FakeRay, make_pool: Callable[..., WorkerPool]) -> None:
    ray.connected = False
    pool = make_pool(1)
    until(lambda: not pool.active)
    assert ray.workers == []
    assert "the connection to the Ray cluster has ended" in pool.describe()


def test_an_actor_that_is_reserved_is_kept_for_the_block(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(1)
    with pool.reserve("a test") as call:
        waiting = pool.schedule(abs, (-3,), 1.0)
        assert not wait([waiting], 0.05).done
        assert call(divmod, (50, 7), 1.0) == (7, 1)
        assert waiting.result(LONG_S) == 3, "the call was made"
    with pool.reserve("a test"):
        pass
    assert pool.schedule(abs, (-4,), 1.0).result(LONG_S) == 4, "no call was"


def test_one_after_the_other_is_given_the_only_actor(make_pool: Callable[..., WorkerPool]) -> None:
    pool, running, most = make_pool(1), [], []

    def run() -> None:
        with pool.reserve("a test") as call:
            running.append(1)
            most.append(len(running))
            running.pop()
            call(abs, (-3,), 1.0)

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert most == [1] * 5


def test_an_actor_that_was_lost_while_idle_is_not_given_away(
    ray: FakeRay, make_pool: Callable[..., WorkerPool]
) -> None:
    pool = make_pool(1)
    until(lambda: pool.describe().startswith("1 of 1"))
    lost = list(ray.workers)

    def before(actor: Any, method: str, args: Any) -> None:
        if actor in lost:
            raise ActorDiedError("its node is gone")

    ray.before = before
    with pool.reserve("a test") as call:
        assert call(abs, (-3,), 1.0) == 3


@pytest.mark.parametrize(
    ("error", "expected"), [(GetTimeoutError(), TimeoutError), (ActorDiedError("killed"), WorkerDied)]
)
def test_the_actor_of_a_reservation_may_hang_or_die(
    make_pool: Callable[..., WorkerPool], error: Exception, expected: type[Exception]
) -> None:
    pool = make_pool(1)
    with pytest.raises(expected), pool.reserve("a test") as call:
        call(raises(error), (), 0.5)
    with pool.reserve("a test") as call:
        assert call(abs, (-3,), 1.0) == 3


def test_one_start_that_fails_gives_nobody_up(ray: FakeRay, make_pool: Callable[..., WorkerPool]) -> None:
    starts = iter([ActorDiedError("its node is dying")] * 2)

    def before(actor: Any, method: str, args: Any) -> None:
        if error := next(starts, None):
            raise error

    ray.before = before
    with make_pool(1).reserve("a test") as call:
        assert call(abs, (-3,), 1.0) == 3


def test_a_reservation_ends_where_no_actor_can_start(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(2, prepare=raises(ImportError("no module called verifier")))
    with pytest.raises(InvalidRequest, match=r"no actor .* for a test: 0 of 2 .*: no module called verifier \["):
        pool.reserve("a test").__enter__()


def test_a_reservation_ends_where_none_runs_for_long(
    ray: FakeRay, make_pool: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(actor: Any, method: str, args: Any) -> None:
        raise GetTimeoutError

    ray.before = full
    monkeypatch.setattr(workers, "_NONE_RUNS_S", 0.05)
    with pytest.raises(NotReady, match=r"no room for a test for 0\.05 s: 0 of 1 run"):
        make_pool(1).reserve("a test").__enter__()


def test_reservations_end_with_the_pool(make_pool: Callable[..., WorkerPool]) -> None:
    pool, began, goes_on, errors = make_pool(1), threading.Event(), threading.Event(), []

    def hang() -> None:
        began.set()
        goes_on.wait()

    def reserve() -> None:
        try:
            with pool.reserve("a test") as call:
                call(hang, (), 600.0)
        except NotReady as error:
            errors.append(error)

    threads = [threading.Thread(target=reserve) for _ in range(2)]
    for thread in threads:
        thread.start()
    began.wait()
    pool.close()
    for thread in threads:
        thread.join(LONG_S)
    goes_on.set()
    assert len(errors) == 2, "one had its actor, the other waited for it"
