"""Zero-variance groups are replaced: within the bound, none twice, and under a real TRL training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from learner.config import LearnerConfig
from learner.rewards.scorer import group_totals
from learner.rollouts.dynamic_sampling import DynamicSampling, varies
from learner.servers.router import GroupRequest
from learner.trainer.attach import attach
from learner.trainer.prompt_order import TrlPrompts
from shared.errors import LockstepError
from shared.rollouts import Completion, VersionSpan
from tests.support import rewards as R

SIZE = 2


def completion(prompt: list[int]) -> Completion:
    return Completion(
        token_ids=prompt, logprobs=[0.0], finish_reason="stop", spans=[VersionSpan(version=None, start=0, end=1)]
    )


class Scores:
    """In the place of `Rewards`: the group of a prompt in `flat` does not vary."""

    def __init__(self, flat: set[int]) -> None:
        self.flat, self.rows, self.completions = flat, [], []

    def expect(self, batch: int, rows: list[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def arrived(self, batch: int, first: int, completions: list[Completion]) -> None:
        assert first == 0
        assert [c.token_ids for c in completions] == [[row["id"]] for row in self.rows]
        self.completions = completions

    def totals(self, batch: int, first: int) -> list[float]:
        return [1.0, 1.0] if self.rows[first]["id"] in self.flat else [0.0, 1.0]


class Spare:
    """In the place of `ComingPrompts`: the rows that a batch of `first` groups leaves."""

    def __init__(self, first: int, count: int) -> None:
        self._ids = range(first, first + count)

    def spare_rows(self, batch: int, count: int) -> list[dict[str, Any]]:
        return [{"id": i} for i in self._ids][:count]

    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return [[row["id"]] for row in rows]


@given(st.integers(1, 6), st.integers(0, 12), st.integers(1, 4), st.data())
def test_it_ends_within_the_bound(groups: int, spare: int, rounds: int, data: st.DataObject) -> None:
    flat = data.draw(st.sets(st.integers(0, groups + spare - 1)))
    scores, asked = Scores(flat), []

    def dispatch(requests: list[GroupRequest]) -> list[Completion]:
        asked.append([request.token_ids[0] for request in requests])
        assert [request.first_row for request in requests] == sorted(request.first_row for request in requests)
        return [completion(request.token_ids) for request in requests for _ in range(request.n)]

    coming = Spare(groups, spare)
    dynamic = DynamicSampling(scores, coming, lambda row, ids: None, size=SIZE, rounds=rounds)  # type: ignore[arg-type]
    prompts = [[i] for i in range(groups) for _ in range(SIZE)]
    dynamic.expect(0, [{"id": i} for [i] in prompts], prompts)
    completions = dynamic.replace(0, [completion(ids) for ids in prompts], dispatch)
    batch = dynamic.take(0)

    assert [c.token_ids for c in completions] == batch.prompts == [[row["id"]] for row in batch.rows]
    firsts = [ids[0] for ids in batch.prompts[::SIZE]]
    assert len(set(firsts)) == groups
    assert batch.prompts == [[i] for i in firsts for _ in range(SIZE)]
    tried = [i for round_of in asked for i in round_of]
    assert len(asked) <= rounds
    assert tried == list(range(groups, groups + len(tried)))
    assert batch.replaced == len(tried)
    kept = [i for i in firsts if i in flat]
    assert batch.kept == len(kept)
    assert not kept or len(asked) == rounds or len(tried) == min(spare, rounds * groups), "no round, or no prompt, left"
    assert dynamic.kept == batch.kept
    assert dynamic.prompts(0) is None


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 1.0], False),
        ([1.0, 0.0], True),
        ([math.nan, 1.0], False),
        ([math.nan] * 2, False),
        ([math.nan, 0.5, 1.0], True),
    ],
)
def test_what_varies(rewards: list[float], expected: bool) -> None:
    assert varies(rewards) is expected


NORMALIZED = [
    # Different advantages, though each row's sum is 2, and none, though the sums are 1 and 2.
    ([[0.0, 2.0], [1.0, 0.0]], [1.0, 2.0], True),
    ([[0.0, 1.0], [2.0, 0.0]], [1.0, 1.0], False),
    ([[0.0, 1.0, None], [1.0, 1.0, 1.0]], [1.0, 1.0], True),
    ([[None, 1.0], [0.5, 0.5]], [1.0, 1.0], False),
    ([[None, 1.0], [None, 0.5]], [1.0, 1.0], False),
]


@pytest.mark.parametrize(("columns", "weights", "expected"), NORMALIZED)
def test_what_varies_after_normalization(columns, weights, expected) -> None:
    """As TRL's advantages of the group among another one that varies."""
    assert varies(group_totals(columns, weights, normalizes=True)) is expected
    of_trl = _normalized_then_summed(columns, weights)
    known = of_trl[~of_trl.isnan()]
    assert bool(known.max() - known.min() > 1e-3) is expected


def _normalized_then_summed(columns, weights) -> torch.Tensor:
    """The lines of TRL's `_generate_and_score_completions`."""
    grouped = torch.tensor([[math.nan if r is None else r for r in column] for column in columns]).T[None]
    mean, std = torch.nanmean(grouped, 1, keepdim=True), nanstd(grouped, dim=1, keepdim=True)
    rewards = (((grouped - mean) / (std + 1e-4))[0] * torch.tensor(weights)).nansum(1)
    rewards[grouped[0].isnan().all(1)] = math.nan
    return rewards


def trainer_of(make_trainer: Any, function: Any, **config: Any) -> GRPOTrainer:
    rows = [{"prompt": f"w{i} w{i + 7}", "easy": i % 3 == 0} for i in range(24)]
    return make_trainer(
        trainer_kwargs={"train_dataset": Dataset.from_list(rows), "reward_funcs": [function]},
        per_device_train_batch_size=16,
        max_steps=4,
        **config,
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_trained_on_varies(make_trainer, client, server, staleness) -> None:
    """Groups of easy prompts never vary; the others, of whose completions one is scored higher, always do."""
    trainer = trainer_of(make_trainer, R.first_is_best_unless_easy)
    session = attach(trainer, client=client, run_id="r", max_staleness=staleness, drop_degenerate_groups=True)
    trainer.train()
    session.close()
    steps = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["frac_reward_zero_std"] for log in steps] == [0.0] * 4
    assert sum(log["lockstep/degenerate_replaced"] for log in steps) == session.summary()["degenerate_replaced"] > 0
    assert session.summary()["degenerate_kept"] == 0
    assert session.summary()["completions"] == 64
    assert set(session.rollouts.stats.staleness) <= {0, staleness}


def test_all_degenerate_is_bounded_and_counted(make_trainer, client, server) -> None:
    trainer = trainer_of(make_trainer, R.all_the_same)
    session = attach(trainer, client=client, run_id="r", drop_degenerate_groups=True, degenerate_rounds=2)
    trainer.train()
    session.close()
    summary = session.summary()
    assert summary["degenerate_replaced"] == 4 * 4 * 2
    assert summary["degenerate_kept"] == 4 * 4
    drawn = [prompt for request in server.generated if request.sampling.n == 4 for prompt in request.prompts]
    assert len(drawn) == 4 * 4 * 3


def test_replacements_are_derived(make_trainer, client, server) -> None:
    """The same for a resumed training, of the dataset, and none of the batch's own."""
    one, other = (TrlPrompts(_begun(trainer_of(make_trainer, R.all_the_same))) for _ in range(2))
    for batch in (0, 2, 1):
        spare = one.spare_rows(batch, 8)
        own = {row["prompt"] for row in one.rows(batch)}
        assert len({row["prompt"] for row in spare} - own) == 8
        assert spare == other.spare_rows(batch, 8)
    assert one.spare_rows(0, 8) != one.spare_rows(1, 8)
    assert len(one.spare_rows(0, 99)) == 20


@pytest.mark.parametrize("batch", [0, 1, 20, 47, 48, 70, 95])
def test_replacements_keep_a_curriculum(make_trainer, batch) -> None:
    """Rows in order of their level: replacements of 4 groups in 3 rounds are at most 6 batches away, of one epoch."""
    rows = Dataset.from_list([{"prompt": f"w{i % 60}", "at": i} for i in range(192)])
    settings = {"per_device_train_batch_size": 16, "shuffle_dataset": False, "max_steps": 96}
    coming = TrlPrompts(_begun(make_trainer(trainer_kwargs={"train_dataset": rows}, **settings)))
    own = {row["at"] for row in coming.rows(batch)}
    spare = [row["at"] for row in coming.spare_rows(batch, 12)]
    assert own == set(range(batch % 48 * 4, batch % 48 * 4 + 4))
    assert len(set(spare)) == 12
    assert not own & set(spare)
    assert max(abs(at - min(own)) for at in spare) <= 6 * 4 + 3


def test_rows_of_a_batch_do_not_depend_on_what_was_read_before(make_trainer) -> None:
    rows = Dataset.from_list([{"prompt": f"w{i % 60}", "at": i} for i in range(40)])
    settings = {"per_device_train_batch_size": 16, "max_steps": 30}
    trainer = _begun(make_trainer(trainer_kwargs={"train_dataset": rows}, **settings))
    one = TrlPrompts(trainer)
    for batch in (0, 1, 5, 4, 12, 11, 3):
        fresh = TrlPrompts(trainer)
        assert one.rows(batch) == fresh.rows(batch)
        assert one.spare_rows(batch, 4) == fresh.spare_rows(batch, 4)


def _begun(trainer: GRPOTrainer) -> GRPOTrainer:
    trainer.state.max_steps = trainer.args.max_steps
    return trainer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward_workers": 0}, "set reward_workers"),
        ({"degenerate_rounds": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LearnerConfig(drop_degenerate_groups=True, **options)


def test_what_cannot_be_replaced_is_refused(make_trainer, client, server) -> None:
    trainer = trainer_of(make_trainer, R.environments_reader)
    with pytest.raises(LockstepError, match="drop_degenerate_groups: rewards must be known"):
        attach(trainer, client=client, run_id="r", drop_degenerate_groups=True)
