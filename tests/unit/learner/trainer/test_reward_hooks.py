"""Rewards of a real TRL trainer: the values that TRL itself would compute, ready when it asks for them."""

from __future__ import annotations

import json
import math
import random
import threading
import time
import traceback
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from learner.config import LearnerConfig
from learner.rewards.calls import RewardError
from learner.trainer.attach import attach
from learner.trainer.reward_hooks import check_rewards, score_in_workers
from shared.errors import InvalidRequest
from shared.rollouts import Completion, VersionSpan
from tests.support import rewards as R
from tests.support.rewards import reward_odd

ROWS = [
    {"prompt": f"w{i} w{i + 7}", "answer": f"w{i}", "nested": {"k": [i, None, 0.1 * i]}, "nan": float("nan")}
    for i in range(4)
]
CHATS = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


@pytest.fixture
def reward_workers() -> None:
    """As many as by default."""


def batch_of(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What TRL hands to `_calculate_rewards` for these rows."""
    rng = random.Random(0)
    inputs = [dict(row) for row in rows for _ in range(4)]
    ids = [[rng.randrange(3, 64) for _ in range(rng.randrange(1, 6))] + [2] for _ in inputs]
    completions = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    if not isinstance(rows[0]["prompt"], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    prompts = [row["prompt"] for row in inputs]
    return {"inputs": inputs, "prompts": prompts, "completions": completions, "completion_ids_list": ids}


def completions_of(batch: dict[str, Any]) -> list[Completion]:
    return [
        Completion(
            token_ids=ids,
            logprobs=[0.0] * len(ids),
            finish_reason="stop",
            spans=[VersionSpan(version=None, start=0, end=len(ids))],
        )
        for ids in batch["completion_ids_list"]
    ]


def logged(trainer: Any) -> tuple[dict[str, Any], dict[str, list[float]]]:
    found = dict(trainer._pending_extra_logs), dict(trainer._pending_metrics)
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    return found


def attached(make_trainer, functions, rows=ROWS, **config):
    """A trainer in training mode, its `Rewards`, a generation batch of all `rows`, and TRL's own results for it."""
    trainer = make_trainer(
        trainer_kwargs={"train_dataset": Dataset.from_list(rows), "reward_funcs": functions},
        per_device_train_batch_size=16,
    )
    trainer.model.train()
    batch = batch_of(trainer, rows)
    own = trainer._calculate_rewards(**batch), *logged(trainer)
    return trainer, score_in_workers(trainer, LearnerConfig(**config)), batch, own


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["text", "chat"])
def test_equal_to_trls_own(make_trainer, rows, caplog) -> None:
    functions = [R.third, R.whole_thirds, reward_odd, R.environments_reader]
    trainer, rewards, batch, (expected, _, metrics) = attached(make_trainer, functions, rows)
    assert functions == [R.third, R.whole_thirds, reward_odd, R.environments_reader], "the user's list stays as it is"
    assert trainer.reward_funcs[3] is R.environments_reader
    assert trainer.reward_funcs[0].__name__ == "third"

    assert_equal(trainer._calculate_rewards(**batch), expected)
    extras, found = logged(trainer)
    assert sum(found["mean_answer"]) / 4 == metrics["mean_answer"][0]
    assert [value is None for value in extras["said"]] == [True] * 8 + [False] * 4 + [True] * 4

    rewards.expect(0, batch["inputs"])
    for first in (8, 0, 12, 4):
        rewards.arrived(None, first, completions_of(batch)[first : first + 4])
    begun = [pending[0] for _, pending in rewards._groups.values()]
    assert_equal(trainer._calculate_rewards(**batch), expected)
    assert len(begun) == 4, "each was fetched, and not computed again"
    assert not rewards._groups, "each was fetched, and not computed again"
    assert logged(trainer) == (extras, found)
    assert not caplog.messages


def holds_a_lock():
    lock = threading.Lock()

    def locked(completions, **_):
        with lock:
            return [1.0 if len(str(completion)) % 2 else None for completion in completions]

    return locked


def test_trl_calls_functions_that_cannot_be_sent_to_a_worker(make_trainer, caplog) -> None:
    function = holds_a_lock()
    trainer, rewards, batch, (expected, _, _) = attached(make_trainer, [R.third, function, reward_odd])
    assert trainer.reward_funcs[1] is function
    [warning] = caplog.messages
    assert "the reward locked runs on the training thread" in warning
    rewards.expect(0, batch["inputs"])
    rewards.arrived(None, 0, completions_of(batch))
    assert_equal(trainer._calculate_rewards(**batch), expected)
    assert not rewards._groups


def test_dynamic_sampling_needs_rewards_of_workers(make_trainer) -> None:
    function = holds_a_lock()
    trainer = make_trainer(trainer_kwargs={"reward_funcs": [reward_odd, function]})
    with pytest.raises(InvalidRequest, match="no reward worker can run locked"):
        score_in_workers(trainer, LearnerConfig(drop_degenerate_groups=True))
    assert trainer.reward_funcs == [reward_odd, function]


def test_ready_when_trl_asks(make_trainer) -> None:
    trainer, rewards, batch, (expected, _, _) = attached(make_trainer, [R.slow])
    rewards.expect(0, batch["inputs"])
    rewards.arrived(None, 0, completions_of(batch))
    time.sleep(2.0)
    assert_equal(trainer._calculate_rewards(**batch), expected)
    assert rewards.wait_seconds < 0.19, "0.2 s each, were they not there"

    rewards.arrived(None, 0, completions_of(batch))
    batch["completion_ids_list"] = [*batch["completion_ids_list"][:5], [9] * 6, *batch["completion_ids_list"][6:]]
    found = trainer._calculate_rewards(**batch)
    assert found[5, 0] == torch.tensor(0.6), "completions that were replaced are scored again"
    batch["inputs"] = [{**row, "answer": "other"} for row in batch["inputs"]]
    rewards.wait_seconds = 0.0
    trainer._calculate_rewards(**batch)
    assert rewards.wait_seconds > 0.3, "and so are rows with other columns"


def test_groups_that_straddle_ranks_are_runs_of_equal_prompts(make_trainer) -> None:
    trainer, rewards, batch, (expected, _, _) = attached(make_trainer, [reward_odd])
    part = {name: values[2:13] for name, values in batch.items()}
    rewards.expect(0, part["inputs"])
    rewards.arrived(None, 0, completions_of(part))
    assert not rewards._groups
    assert_equal(trainer._calculate_rewards(**part), expected[2:13])


def test_evaluation_has_its_own_groups(make_trainer) -> None:
    trainer, rewards, batch, (expected, _, _) = attached(make_trainer, [reward_odd])
    trainer.model.eval()
    trainer.num_generations_eval = 1
    assert_equal(trainer._calculate_rewards(**batch), expected)
    assert rewards.wait_seconds == 0.0


def test_functions_that_hang_are_left_out_and_counted(make_trainer, caplog) -> None:
    trainer = make_trainer(trainer_kwargs={"reward_funcs": [R.hangs_sometimes]})
    rewards, batch = score_in_workers(trainer, LearnerConfig(reward_timeout_s=0.2)), batch_of(trainer, ROWS)
    found = trainer._calculate_rewards(**batch)[:, 0]
    long = torch.tensor([len(ids) == 6 for ids in batch["completion_ids_list"]])
    assert long.any()
    assert torch.equal(found.isnan(), long)
    assert (found[~long] == 1.0).all()
    assert rewards.unscored == {"hangs_sometimes": int(long.sum())}
    [warning] = [record.getMessage() for record in caplog.records if record.name == "lockstep.rewards"]
    assert "reward_timeout_s" in warning


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (R.raises, r"'raises' raised KeyError: 'no such answer' \(in raises, .*rewards.py:"),
        (R.too_few, r"'too_few' returned 1 rewards for \d+ completions"),
        (R.not_a_number, r"'not_a_number' returned nan for completion 2 \(prompt: 'w0 w7'\)"),
        (R.infinite_later, r"'infinite_later' returned inf for completion 1 \(prompt: 'w0 w7'\)"),
        (R.too_large, r"'too_large' returned 1e\+39 for completion 1 "),
        (R.text, r"'text' returned '0.5' for completion 1 "),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_reward_is_one_line_wherever_it_is_computed(make_trainer, function, words, workers) -> None:
    trainer = make_trainer(trainer_kwargs={"reward_funcs": [function]})
    if workers:
        score_in_workers(trainer, LearnerConfig(reward_workers=workers))
    check_rewards(trainer)
    with pytest.raises(RewardError, match=words) as refused:
        trainer._calculate_rewards(**batch_of(trainer, ROWS))
    assert "\n" not in refused.value.message
    if function is R.raises:
        shown = "".join(traceback.format_exception(refused.value))
        assert 'raise KeyError("no such answer")' in shown


def test_a_training_without_any_reward_ends(make_trainer, client, tmp_path) -> None:
    def unsure(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make_trainer(trainer_kwargs={"reward_funcs": [unsure, unsure]})
    attach(trainer, client=client)
    with pytest.raises(RewardError, match="none of 8 completions has a reward: unsure, unsure_2 returned None for all"):
        trainer.train()


def test_rewards_may_be_away_for_two_batches_and_be_none_for_some_rows(make_trainer, client, tmp_path) -> None:
    batches = iter([1.0, None, None, 1.0, None, None, None])

    def flaky(completions: list[str], **_: Any) -> list[float | None]:
        return [next(batches), *[None] * (len(completions) - 1)]

    trainer = make_trainer(max_steps=9, trainer_kwargs={"reward_funcs": flaky})
    attach(trainer, client=client, reward_workers=0)
    with pytest.raises(RewardError, match="none of 8 completions of each of 3 batches"):
        trainer.train()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["reward"] for row in rows] == [1.0, None, None, 1.0, None, None]


def test_a_reward_model_that_diverged_is_named(make_trainer) -> None:
    trainer = make_trainer()
    trainer.reward_funcs = [nn.Linear(1, 1)]
    trainer._calculate_rewards = lambda: torch.tensor([[0.5], [math.inf]])
    check_rewards(trainer)
    with pytest.raises(RewardError, match="'reward_odd' returned inf for completion 2 "):
        trainer._calculate_rewards()


def test_two_rewards_of_one_name_are_kept_apart(make_trainer, client, server) -> None:
    def odd(completion_ids, **_):
        return [0.25] * len(completion_ids)

    odd.__name__ = "reward_odd"
    trainer = make_trainer(trainer_kwargs={"reward_funcs": [reward_odd, odd]}, max_steps=1)
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    session.close()
    assert trainer.state.log_history[0]["rewards/reward_odd_2/mean"] == 0.25


def test_reward_models_stay_where_they_are(make_trainer) -> None:
    trainer = make_trainer()
    model = nn.Linear(1, 1)
    trainer.reward_funcs = [model]
    score_in_workers(trainer, LearnerConfig())
    assert trainer.reward_funcs == [model]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_slow_reward_under_a_real_training(make_trainer, server, client, staleness) -> None:
    """0.2 s of rewards per batch beside 0.6 s of training: read ahead, they cost a step nothing."""
    trainer = make_trainer(trainer_kwargs={"reward_funcs": [R.slow]}, max_steps=4)

    class Trains(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            time.sleep(0.6)

    session = attach(trainer, client=client, run_id="r", max_staleness=staleness)
    trainer.add_callback(Trains())
    trainer.train()
    session.close()
    waits = [report.reward_wait_seconds for report in session.metrics.reports]
    assert len(waits) == 4
    assert session.summary()["unscored_rewards"] == 0
    # A busy machine may spoil any one step.
    assert min(waits[2:]) < 0.1 if staleness else max(waits) > 0.1
    logged = [log["lockstep/reward_wait_seconds"] for log in trainer.state.log_history if "reward" in log]
    assert logged == pytest.approx(waits)
