"""A generation batch that is one step goes through the model once, and nothing is kept that is of no use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from learner.passes.packing import Row
from learner.trainer.attach import attach
from learner.trainer.filled_keys import distinct_runs
from learner.trainer.internals import TrlTrainer
from learner.trainer.kept_pass import Keeping
from learner.trainer.packed_scoring import PackedScoring


@pytest.fixture
def kept(make_trainer, client, monkeypatch) -> Callable[..., tuple[PackedScoring, list[bool]]]:
    """Trains two steps; returns what scores, and of each kept pass whether the trained adapter was on."""
    seen: list[bool] = []
    score = PackedScoring._score_all

    def score_seen(self, model, *args, **options):
        scored = score(self, model, *args, **options)
        if scored[2]:
            seen.append(model.active_adapters == ["default"])
        return scored

    monkeypatch.setattr(PackedScoring, "_score_all", score_seen)

    def train(prepare=lambda trainer: None, options=None, **config) -> tuple[PackedScoring, list[bool]]:
        trainer = make_trainer(max_steps=2, **config)
        prepare(trainer)
        session = attach(
            trainer, client=client, run_id="r", proof_canary=False, proof_tolerance=99.0, **(options or {})
        )
        trainer.train()
        assert isinstance(session.trainer, TrlTrainer)
        assert session.trainer.scoring
        return session.trainer.scoring, seen

    return train


def with_reference(trainer) -> None:
    """As TRL has it where an adapter is trained on: a copy of it, by the name of ref."""
    trainer.model.add_adapter("ref", trainer.model.peft_config["default"])
    trainer.model.set_adapter("default")


def test_the_policys_pass_is_kept_each_step(kept):
    scoring, seen = kept()
    assert seen == [True, True]
    assert not scoring.scores_apart
    assert scoring._kept is None


@pytest.mark.parametrize("prepare", [lambda trainer: None, with_reference], ids=["disabled", "ref"])
def test_a_references_pass_is_not(kept, prepare):
    scoring, seen = kept(prepare, beta=0.1)
    assert seen == [True, True]
    assert scoring.scores_apart


def test_nothing_is_kept_where_the_model_recomputes_its_activations(kept):
    scoring, seen = kept(lambda trainer: trainer.model.gradient_checkpointing_enable())
    assert not seen
    assert scoring.scores_apart


def test_nothing_is_kept_beside_a_reward_model(make_trainer):
    trainer = make_trainer()
    keeping = Keeping(trainer)
    keeping.look()
    assert keeping.keeps
    trainer.reward_funcs = [torch.nn.Linear(1, 1)]
    keeping = Keeping(trainer)
    keeping.look()
    assert not keeping.keeps


def test_batches_of_several_passes_are_scored_apart(kept):
    scoring, seen = kept(options={"max_tokens_per_pass": 20})
    assert not seen
    assert scoring.scores_apart


def test_a_training_that_ends_within_a_step_leaves_nothing(kept):
    class Stops(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            control.should_training_stop = True

    scoring, seen = kept(
        lambda trainer: trainer.add_callback(Stops()), per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert seen
    assert scoring._kept is None
    assert not scoring._owed


def test_a_prompt_counts_once_where_the_memory_of_a_pass_is_not_known_yet(kept):
    scoring, _ = kept()
    scoring._finds_out, model = True, scoring._trainer.model
    scoring._max_tokens = 4096
    with torch.no_grad():
        assert scoring._score_all(model, [Row([5] * 60, [6])] * 20, 1, None, keeps=True)[2]
        assert not scoring._score_all(model, [Row([5 + i] * 60, [6]) for i in range(20)], 1, None, keeps=True)[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1}, {"a": True}), ({"a": 1}, {"a": 1.0}), ({"a": 1, "b": 2}, {"b": 2, "a": 1})],
    ids=["bool", "float", "order"],
)
def test_prompts_that_are_equal_and_rendered_apart_are_two(one, other):
    prompts = [[{"role": "user", "content": "w1", "arguments": each}] for each in (one, one, other)]
    assert prompts[0] == prompts[2]
    assert distinct_runs(prompts)[1] == [0, 0, 1]


def test_each_row_of_a_group_has_values_of_its_own(make_trainer, client):
    trainer = make_trainer()
    trainer.train_dataset = Dataset.from_list([{"prompt": f"w{i}", "answer": ["w1"]} for i in range(16)])
    session = attach(trainer, client=client, run_id="r", proof_canary=False)
    first, second, *_ = session.trainer.coming_prompts().rows(0)
    assert first == second
    first["answer"].append("w2")
    assert second["answer"] == ["w1"]
