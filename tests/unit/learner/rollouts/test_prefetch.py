"""The bound on staleness, and no prompt lost or doubled: real threads, random delays, a server that goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.rollouts.completions import AllowedVersion
from learner.rollouts.dispatch import Dispatcher
from learner.rollouts.generation import RemoteRollouts
from learner.rollouts.prefetch import Prefetcher
from learner.rollouts.schedule import Schedule
from learner.servers.pool import ServerPool
from learner.servers.replica import Replica
from shared.errors import InvalidRequest, LockstepError, UnknownRun, VersionNotActive
from shared.rollouts import Completion, GenerateRequest, RolloutGroup, VersionSpan
from shared.sampling import SamplingParams
from shared.weights import ServerState, WeightVersion


class Server:
    """Serves what was pushed last, and may be slow, answer late with old weights, or forget everything."""

    url = "http://fake"

    def __init__(self, delays: list[float], old: list[int], losses: set[int]) -> None:
        self.step: int | None = None
        self.history: list[int] = []
        self.asked = 0
        self._delays, self._old, self._losses = delays, old, losses
        self.lock = threading.Lock()

    def push(self, step: int) -> None:
        self.step = step
        self.history.append(step)

    def iter_groups(self, request: GenerateRequest) -> Iterator[RolloutGroup]:
        with self.lock:
            call, self.asked = self.asked, self.asked + 1
            if call in self._losses:
                self.step = None
            step, history = self.step, list(self.history)
        if step is None:
            raise UnknownRun("forgotten")
        time.sleep(self._delays[call % len(self._delays)])
        if request.policy == "latest":
            step = history[-1 - min(self._old[call % len(self._old)], len(history) - 1)]
        elif request.policy.step != step:
            raise VersionNotActive(f"serving {step}")
        version = WeightVersion(run_id="r", step=step)
        groups = [
            RolloutGroup(
                prompt_index=i,
                prompt_token_ids=prompt.token_ids,
                completions=[
                    Completion(
                        token_ids=[*prompt.token_ids, step],
                        logprobs=[-1.0, -1.0],
                        finish_reason="stop",
                        spans=[VersionSpan(version=version, start=0, end=2)],
                    )
                    for _ in range(request.sampling.n)
                ],
            )
            for i, prompt in enumerate(request.prompts)
        ]
        yield from groups

    def state(self, timeout_s: float = 1.0) -> SimpleNamespace:
        """Polled by the supervisor; the rest of its check needs a receipt."""
        return SimpleNamespace(draining=False)


class Prompts:
    """In the place of `ComingPrompts`: three rows a batch, two of them with the same prompt."""

    def rows(self, batch: int) -> list[dict[str, int]]:
        return [{"id": batch}, {"id": batch}, {"id": batch + 1000}]

    def token_ids(self, rows: list[dict[str, int]]) -> list[list[int]]:
        return [[row["id"]] for row in rows]


class Training:
    """The trainer's loop: generate, train for `per_batch` micro-steps, push after every optimizer step."""

    is_training = True
    coming_prompts = Prompts

    def __init__(self, server: Server, schedule: Schedule, staleness: int) -> None:
        self.server, self.schedule, self.step, self.micro_step = server, schedule, 0, 0
        self.served, self.step_seconds = 0, 0.0
        pool = ServerPool.of(server, ServerState.model_construct(), patience_s=60.0)  # type: ignore[call-arg]
        pool.supervise(self.bring_back)
        self.pool = pool
        self.staleness = staleness
        dispatcher = Dispatcher(pool, SamplingParams(max_tokens=4), max_model_len=99)
        self.rollouts = RemoteRollouts(dispatcher, self, self)

    @property
    def generation_batch(self) -> int:
        return self.schedule.batch_at(self.micro_step)

    def allowed_version(self, *, ahead: bool) -> AllowedVersion:
        return AllowedVersion(WeightVersion(run_id="r", step=self.step), exact=not ahead)

    def ensure_served(self) -> None: ...

    def seed_of(self, row: int, token_ids: list[int]) -> None: ...

    def push_first(self) -> None:
        self.server.push(0)
        self.rollouts.read_ahead(self.staleness)

    def bring_back(self, replica: Replica) -> None:
        with self.server.lock:
            if self.server.step is None:
                self.server.push(self.served)
        self.pool.mark_up(replica)

    def run(self) -> list[tuple[int, list[list[int]]]]:
        """Completions by generation batch, in the order in which they were trained on."""
        trained = []
        self.push_first()
        while self.step < self.schedule.max_steps:
            batch = self.generation_batch
            if self.micro_step % self.schedule.per_batch == 0:
                prompts = [[batch], [batch], [batch + 1000]]
                trained.append((batch, self.rollouts.generate(prompts, None, 2)[1]))
            self.micro_step += 1
            length = self.schedule.per_epoch * self.schedule.per_batch
            within = (self.micro_step - 1) % length
            if (within + 1) % self.schedule.accumulation == 0 or within + 1 == length:
                self.step += 1
                time.sleep(self.step_seconds)
                with self.server.lock:
                    self.served = self.step
                    self.server.push(self.step)
        self.pool.close()
        return trained


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Schedule,
        per_batch=st.integers(1, 3),
        accumulation=st.integers(1, 3),
        per_epoch=st.integers(2, 4),
        max_steps=st.integers(1, 8),
    ),
    st.integers(1, 3),
    st.lists(st.sampled_from([0.0, 0.001, 0.02]), min_size=1, max_size=5),
    st.lists(st.integers(0, 8), min_size=1, max_size=5),
    st.sets(st.integers(0, 10), max_size=2),
)
def test_every_batch_once_in_order_and_never_too_old(schedule, staleness, delays, old, losses) -> None:
    training = Training(Server(delays, old, losses), schedule, staleness)
    trained = training.run()
    assert [batch for batch, _ in trained] == list(range(schedule.last_batch + 1))
    for batch, completions in trained:
        assert [tokens[0] for tokens in completions] == [batch, batch, batch + 1000]
        assert all(schedule.staleness(batch, tokens[1]) <= staleness for tokens in completions)
    stats = training.rollouts.stats
    assert sum(stats.staleness.values()) == stats.completions == 3 * len(trained)
    assert max(stats.staleness) <= staleness


def test_the_server_works_while_the_trainer_trains() -> None:
    """Rollouts and training take equally long: read ahead, the trainer waits for the first batch and hardly later."""
    schedule = Schedule(per_batch=1, accumulation=1, per_epoch=6, max_steps=6)
    training = Training(Server([0.4], [0], set()), schedule, 1)
    training.step_seconds = 0.4
    training.run()
    assert training.rollouts.stats.wait_seconds < 1.6, "2.4 s without reading ahead, 0.4 with"
    assert training.rollouts.stats.staleness == {0: 3, 1: 15}
    assert training.rollouts.prefetcher.busy_seconds > 2.2


def test_other_prompts_than_expected_are_not_served_from_the_cache() -> None:
    training = Training(Server([0.0], [0], set()), Schedule(1, 1, 4, 4), 1)
    training.push_first()
    assert training.rollouts.prefetcher.take(0, [[7]]) is None
    _, completions, _, _ = training.rollouts.generate([[7]], None, 1)
    assert completions == [[7, 0]]


def test_errors_reach_the_trainer() -> None:
    def fail(batch, prompts):
        raise InvalidRequest("too long")

    prefetcher = Prefetcher(lambda batch: ([[1]], ""), fail, schedule=Schedule(1, 1, 4, 4), max_staleness=1)
    prefetcher.request(0, 3)
    with pytest.raises(LockstepError, match="too long"):
        prefetcher.take(0, ([[1]], ""))
