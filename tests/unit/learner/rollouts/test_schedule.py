"""When generation batches begin, their prompts, and staleness: against TRL's own order."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from learner.rollouts.schedule import Schedule
from learner.session import prompt_seed
from learner.trainer.prompt_order import coming_indices, skip_epochs

schedules = st.builds(
    Schedule,
    per_batch=st.integers(1, 6),
    accumulation=st.integers(1, 6),
    per_epoch=st.integers(1, 5),
    max_steps=st.integers(1, 40),
)


def walk(schedule: Schedule):
    """The training as transformers runs it: (micro-step, optimizer steps done before it)."""
    step, micro = 0, 0
    while step < schedule.max_steps:
        length = schedule.per_epoch * schedule.per_batch
        for within in range(length):
            yield micro, step
            micro += 1
            if (within + 1) % schedule.accumulation == 0 or within + 1 == length:
                step += 1
                if step == schedule.max_steps:
                    return


@settings(deadline=None)
@given(schedules)
def test_agrees_with_the_training_loop(schedule: Schedule) -> None:
    begun: dict[int, int] = {}
    for micro, step in walk(schedule):
        batch = schedule.batch_at(micro)
        if batch not in begun:
            assert schedule.next_batch(micro) == batch == len(begun)
            begun[batch] = step
        assert schedule.first_step(batch) == begun[batch]
    assert schedule.last_batch == max(begun)
    for batch, first in begun.items():
        assert schedule.staleness(batch, first) == 0
        for step in range(first):
            newer = [b for b in range(batch + 1) if begun[b] > step]
            assert schedule.staleness(batch, step) == len(newer)


@given(st.integers(4, 12), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.randoms())
def test_reads_what_the_loader_will_read(size: int, prompts: int, generations: int, repeats: int, random) -> None:
    def sampler() -> RepeatSampler:
        return RepeatSampler(range(size), generations, prompts, repeats, shuffle=True, seed=7)

    rows, per_epoch = prompts * generations, size // prompts
    schedule = Schedule(per_batch=repeats, accumulation=1, per_epoch=per_epoch, max_steps=1)
    loader, expected = sampler(), []
    for _ in range(3):
        epoch = list(loader)
        expected += [epoch[i : i + rows] for i in range(0, len(epoch), rows * repeats)]
    ahead = coming_indices(sampler(), rows=rows, schedule=schedule, first=0)
    assert list(islice(ahead, 3 * per_epoch)) == expected
    batch = random.randrange(3 * per_epoch)
    ahead = coming_indices(sampler(), rows=rows, schedule=schedule, first=batch)
    assert next(ahead) == expected[batch], "any batch, not only the next one"
    resumed = sampler()
    skip_epochs(resumed, 2)
    assert list(resumed)[:rows] == expected[2 * per_epoch]


@given(st.integers(), st.lists(st.integers(), max_size=3), st.lists(st.integers(), max_size=3))
def test_seeds_tell_places_apart(base: int, one: list[int], other: list[int]) -> None:
    assert 0 <= prompt_seed(base, *one) < 2**62
    assert (prompt_seed(base, *one) == prompt_seed(base, *other)) == (one == other)


@pytest.mark.parametrize(
    ("per_batch", "accumulation", "iterations", "share"),
    [(4, 4, 1, 1.0), (8, 4, 2, 1.0), (8, 4, 1, 0.5), (1, 4, 1, 4.0)],
)
def test_what_an_optimizer_step_trains_on(per_batch: int, accumulation: int, iterations: int, share: float) -> None:
    schedule = Schedule(per_batch, accumulation, per_epoch=8, max_steps=8, iterations=iterations)
    assert schedule.batches_per_step == share
