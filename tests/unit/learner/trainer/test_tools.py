"""TRL's tool loop and its environments over a fake server: turns, versions, counts, and reading ahead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from learner.trainer.attach import attach
from shared.errors import LockstepError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %} {{ call['function']['name'] }} "
    "{{ call['function']['arguments'] | tojson }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
#: A word that begins with w1 calls the tool with the rest of the completion, so a random model calls it now and then.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<eos>",
    "fields": {
        "tool_calls": {
            "open_pattern": "w(?=1)",
            "close_pattern": "<eos>",
            "content": "text",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "count", "arguments": {"words": "{content}"}}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"w{i} w{i + 7}"}]} for i in range(16)])


def count(words: str) -> str:
    """Count words.

    Args:
        words: The words.
    """
    return f"w{len(words.split())}"


class Counter:
    """An environment that counts its calls."""

    def reset(self, **_: object) -> str:
        self.calls = 0
        return " w5"

    def count(self, words: str) -> str:
        """Count words.

        Args:
            words: The words.
        """
        self.calls += 1
        return count(words)

    def get_reward(self) -> float:
        return float(self.calls)


@pytest.fixture
def make_tool_trainer(make_trainer, model_dir) -> Callable:
    def make(**changes):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
        given = {"tools": [count], "train_dataset": CHATS, "processing_class": tokenizer}
        trainer_kwargs = given | changes.pop("trainer_kwargs", {})
        settings = {"max_completion_length": 24, "max_tool_calling_iterations": 2, **changes}
        return make_trainer(trainer_kwargs=trainer_kwargs, **settings)

    return make


def batches_of(trainer) -> list[dict]:
    """What is generated for training, as it comes."""
    generate, batches = trainer._generate_and_score_completions, []

    def generate_and_keep(inputs):
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = generate_and_keep
    return batches


def test_logprobs_of_all_turns_are_the_trainers(make_tool_trainer, server, client):
    server.log_kept_mass = 0.0
    trainer = make_tool_trainer()
    session = attach(trainer, client=client, run_id="r")
    batches = batches_of(trainer)
    trainer.train()
    assert session.metrics.mismatch.delta < 1e-4
    assert session.proof.max_mismatch < 1e-4
    calls = [log["tools/call_frequency"] for log in trainer.state.log_history if "reward" in log]
    assert len(calls) == 3
    assert all(calls)
    for batch in batches:
        mask_BT, served_BT = batch["tool_mask"], batch["sampling_per_token_logps"]
        result_BT = (mask_BT == 0) & batch["completion_mask"].bool()
        assert result_BT.any()
        assert (served_BT[result_BT] == 0).all()
        sampled_BT = mask_BT.bool() & batch["completion_mask"].bool()
        assert torch.allclose(served_BT[sampled_BT], batch["old_per_token_logps"][sampled_BT], atol=1e-4)
    asked = [r for r in server.generated if r.policy != "base"]
    later = [r for r in asked if r.sampling.n != 4 or len(r.prompts) != 2]
    assert later, "every turn is of the version that is trained"
    assert {r.policy.step for r in later} == {0, 1, 2}, "every turn is of the version that is trained"
    stats = session.rollouts.stats
    assert stats.completions == 24, "a completion is one, however many turns it has"
    assert dict(stats.staleness) == {0: 24}, "a completion is one, however many turns it has"
    drawn = sum(len(c.prompts) * c.sampling.n for c in asked)
    assert drawn > 24
    assert stats.completion_tokens > 24


def test_a_turn_that_finds_the_context_full(make_tool_trainer, server, client):
    """TRL knows the model's context, not the server's."""
    server.state = server.state.model_copy(update={"max_model_len": 31})
    trainer = make_tool_trainer(max_tool_calling_iterations=8)
    session = attach(trainer, client=client, run_id="r")
    batches = batches_of(trainer)
    trainer.train()
    assert session.rollouts.dispatcher.capped_prompts > 0
    assert all(len(p.token_ids) < 31 for r in server.generated for p in r.prompts)
    assert len(batches) == 3
    assert session.metrics.mismatch.delta < 1e-4


def test_first_turns_are_read_ahead_and_later_ones_are_of_the_present_weights(make_tool_trainer, server, client):
    server.state = server.state.model_copy(update={"slots_per_run": 3})
    trainer = make_tool_trainer(max_steps=4)
    session = attach(trainer, client=client, run_id="r", max_staleness=1)
    trainer.train()
    staleness = session.rollouts.stats.staleness
    assert sum(staleness.values()) == session.rollouts.stats.completions == 32
    assert staleness[1] >= 16
    assert set(staleness) <= {0, 1}
    assert session.rollouts.prefetcher.mismatches == 0
    later = [r.policy.step for r in server.generated if r.policy not in ("base", "latest") and r.sampling.n < 4]
    assert later == sorted(later)
    assert later[-1] == 3


def test_environments(make_tool_trainer, server, client):
    """Their rewards are read from their state, so TRL calls them; nothing of them can be read ahead."""
    given = {"tools": None, "environment_factory": Counter, "reward_funcs": None}
    trainer = make_tool_trainer(trainer_kwargs=given)
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    rewards = [log["rewards/Counter/mean"] for log in trainer.state.log_history if "reward" in log]
    assert len(rewards) == 3
    assert max(rewards) > 0
    assert session.metrics.mismatch.delta < 1e-4
    with pytest.raises(LockstepError, match="environments"):
        attach(make_tool_trainer(trainer_kwargs=given), client=client, max_staleness=1)
    with pytest.raises(LockstepError, match="tools, environments"):
        attach(make_tool_trainer(), client=client, drop_degenerate_groups=True)


def test_a_rollout_function_that_asks_our_servers(make_trainer, server, client):
    """TRL hands it the trainer; what it generates with is there."""

    def rollout(prompts, trainer):
        ids, _, _ = trainer._tokenize_prompts(prompts)
        prompt_ids, completion_ids, logprobs, _ = trainer.vllm_generation.generate(ids, None, trainer.num_generations)
        flat = [[top[0] for top in row] for row in logprobs]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": flat}

    trainer = make_trainer(trainer_kwargs={"rollout_func": rollout})
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    assert session.rollouts.stats.completions == 24
    assert session.metrics.mismatch.delta < 1e-4
