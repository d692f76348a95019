"""The output of `learner export` gives the same completions as the served policy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from learner.commands.export import export
from learner.servers.client import RolloutClient
from tests.integration.support import policy as P

LORA = {"plain": {}, "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"o_proj": 5}}}


@pytest.mark.parametrize("lora", LORA)
def test_greedy_answers_are_the_served_policys(client: RolloutClient, model: Path, tmp_path: Path, lora: str) -> None:
    """Every token of 64 completions is the one that the merged model, and the base with the adapter, would choose."""
    policy = P.make_policy(model, **LORA[lora])
    P.randomize(policy, seed=40)
    P.push(client, policy, f"exported-{lora}", step=0)
    policy.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", merged=True, dtype="float32")
    export(tmp_path / "adapter", tmp_path / "alone")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "alone")

    draw = random.Random(1)
    prompts = [[draw.randrange(3, 500) for _ in range(draw.randrange(4, 24))] for _ in range(64)]
    answer = P.generate(client, prompts, temperature=0.0, max_tokens=24)
    answers = {tuple(group.completions[0].token_ids) for group in answer.groups}
    assert len(answers) > 8, "answers must depend on their prompts"
    for loaded in (merged, adapted):
        equal = sum(_greedy(loaded, g.prompt_token_ids, g.completions[0].token_ids) for g in answer.groups)
        assert equal == 64
    base = AutoModelForCausalLM.from_pretrained(model)
    assert sum(_greedy(base, g.prompt_token_ids, g.completions[0].token_ids) for g in answer.groups) < 32


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> bool:
    logits_TV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.argmax(-1).tolist() == completion
