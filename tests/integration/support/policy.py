"""Policies of the tests: PEFT adapters with random weights, and their expected logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.adapters.exporter import AdapterExporter
from learner.servers.client import RolloutClient
from shared.rollouts import GenerateRequest, GenerateResponse, Prompt, ScoreRequest
from shared.sampling import SamplingParams
from shared.weights import PushReceipt, WeightVersion
from tests.integration.support.server import HTTP

LEASE = "a lease for tests"
PROBE = list(range(5, 40))
#: Largest gap between two float32 computations of the same logprobs, in nats.
FP32 = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_policy(model: Path, **lora: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora})
    return get_peft_model(base, config)


def randomize(policy: PeftModel, seed: int, scale: float = 0.3) -> None:
    """Set random A and B, large enough to change every logprob."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def reference(policy: PeftModel, sequence: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Return ln p of tokens 1.. of `sequence` [T - 1], computed by Hugging Face in float32."""
    logits_TV = policy(torch.tensor([sequence])).logits[0, :-1].float() / temperature
    targets_T = torch.tensor(sequence[1:])
    return torch.log_softmax(logits_TV, -1).gather(1, targets_T[:, None])[:, 0]


@torch.no_grad()
def top_k_mass(policy: PeftModel, sequence: list[int], k: int, temperature: float) -> torch.Tensor:
    """Return ln of the mass of the k most likely tokens before each of tokens 1.. of `sequence` [T - 1]."""
    logits_TV = policy(torch.tensor([sequence])).logits[0, :-1].float() / temperature
    return logits_TV.topk(k).values.logsumexp(-1) - logits_TV.logsumexp(-1)


def blob(policy: PeftModel, version: WeightVersion, base: str | None, dtype: str = "float32") -> bytes:
    return b"".join(AdapterExporter(policy, dtype=dtype, base_weights=base).export(version).pieces())


def push(client: RolloutClient, policy: PeftModel, run_id: str, step: int, fence: int = 0) -> PushReceipt:
    version = WeightVersion(run_id=run_id, fence=fence, step=step)
    data = blob(policy, version, client.state().base.weights)
    return client.push(run_id, [data], LEASE, takeover=True)


def score(client: RolloutClient, sequence: list[int], **policy: Any) -> torch.Tensor:
    return torch.tensor(client.score(ScoreRequest(sequences=[sequence], **policy)).logprobs[0])


def generate(
    client: RolloutClient, prompts: list[list[int]], policy: Any = "latest", **sampling: Any
) -> GenerateResponse:
    request = GenerateRequest(
        prompts=[Prompt(token_ids=ids) for ids in prompts], policy=policy, sampling=SamplingParams(**sampling)
    )
    return client.generate(request)


def largest_gap(policy: PeftModel, answer: GenerateResponse, temperature: float = 1.0) -> float:
    """Return the largest |served - reference| logprob over all completions."""
    gaps = []
    for group in answer.groups:
        for completion in group.completions:
            whole = group.prompt_token_ids + completion.token_ids
            expected = reference(policy, whole, temperature)[len(group.prompt_token_ids) - 1 :]
            gaps.append((torch.tensor(completion.logprobs) - expected).abs().max().item())
    return max(gaps)


@torch.no_grad()
def policy_logits(policy: PeftModel, sequence: list[int]) -> torch.Tensor:
    """Return logits [V] of the token after `sequence`."""
    return policy(torch.tensor([sequence])).logits[0, -1].float()


def chat_token_ids(model: Path, messages: list[dict]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def chat_gap(client: RolloutClient, policy: PeftModel, prompt: list[int], messages: list[dict]) -> float:
    """Return the largest gap of vLLM's own chat route, model `policy`, at temperature 1."""
    body = {
        "model": "policy",
        "messages": messages,
        "max_tokens": 8,
        "temperature": 1.0,
        "logprobs": True,
        "return_token_ids": True,
    }
    answer = HTTP.post(f"{client.url}/v1/chat/completions", json=body)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    served = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
    expected = reference(policy, prompt + choice["token_ids"])[len(prompt) - 1 :]
    return (served - expected).abs().max().item()
