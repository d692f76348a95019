"""Peer: TRL's `AsyncGRPOTrainer`: a plain `vllm serve`, adapters through files, torch's kernel for its attention.

TRL fetches FlashAttention 3 from the hub, where benches are not. It calls it in one place, with one signature.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerFast, TrainerCallback

from bench.common.servers import Server, Setting
from bench.common.training import grpo_config, lora_config, odd_tokens
from bench.contenders.vllm_adapter_files import serve_adapters
from learner.passes.attention import causal_varlen

NOTE = (
    "TRL's AsyncGRPOTrainer with its own max_staleness and adapters through local files, its fixed number of "
    "completions a micro-batch; attention by torch.nn.attention.varlen (on a CPU by scaled dot products) in place of "
    "the hub's FlashAttention 3; stop tokens by the server's generation config"
)
#: Its worker takes conversations only. This one's tokens are those of the prompt.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
#: None that can be read: TRL then takes an answer as plain text.
RESPONSE_TEMPLATE: dict[str, Any] = {}


def serve(
    setting: Setting, folder: Path, max_rank: int, *, max_staleness: int, stop_token_ids: Sequence[int]
) -> Server:
    """Start the server that the trainer needs; it need not be ready.

    Args:
        max_staleness: requests may name one version more than that, and a sync loads the next one before it unloads
            the oldest.
        stop_token_ids: the trainer's requests have none, so that they come as further EOS ids of the model.
    """
    generation = setting.work / "generation"
    generation.mkdir(exist_ok=True)
    (generation / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *stop_token_ids]}))
    flags = ["--max-loras", str(max_staleness + 2), "--max-lora-rank", str(max_rank)]
    flags += ["--generation-config", str(generation)]
    return serve_adapters(setting, folder, f"{folder.name}-asynchronous.log", *flags, VLLM_SERVER_DEV_MODE="1")


def use_torch_attention(packing: Any) -> None:
    """Put torch's attention where TRL's module `packing` would fetch a kernel from the hub."""
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


def flash_attn_varlen_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Return causal attention [N, heads, head size] of sequences that lie one after the other."""
    if not causal or window_size != (-1, -1):
        raise ValueError("only full causal attention")
    if query.device.type == "cuda":
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return causal_varlen(query, key, value, *lengths, softmax_scale)
    parts = []
    ends = zip(*(cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    (q, k), *rest = ends
    for next_q, next_k in rest:
        own, keys, values = (x.transpose(0, 1)[None] for x in (query[q:next_q], key[k:next_k], value[k:next_k]))
        mask = torch.ones(next_q - q, next_k - k, dtype=torch.bool).tril(next_k - k - (next_q - q))
        grouped = query.shape[1] != key.shape[1]
        attended = scaled_dot_product_attention(own, keys, values, mask, scale=softmax_scale, enable_gqa=grouped)
        parts.append(attended[0].transpose(0, 1))
        q, k = next_q, next_k
    return torch.cat(parts)


def make_trainer(training: Namespace, prompts: Sequence[str], max_steps: int, callback: TrainerCallback) -> Any:
    """Return an AsyncGRPOTrainer on the prompts of a training of `bench.step`."""
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    use_torch_attention(packing)
    if not torch.cuda.is_available():  # it would ask for the name of a GPU
        async_grpo_trainer.get_peak_flops_per_device = lambda accelerator, dtype: None
    args = grpo_config(
        training,
        kind=AsyncGRPOConfig,
        output=training.output,
        cpu=not torch.cuda.is_available(),
        dtype=training.dtype,
        max_steps=max_steps,
        micro_batch=min(training.batch, training.packed_micro_batch),
        checkpointing=training.checkpointing,
        model_init_kwargs={"dtype": training.dtype},
        temperature=1.0,
        max_staleness=training.max_staleness,
        token_budget=0,  # else its steps would not all have the same number of completions
        vllm_server_base_url=training.url,
        logging_steps=1,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(training.folder)
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return AsyncGRPOTrainer(
        model=training.folder,
        processing_class=tokenizer,
        args=args,
        reward_funcs=odd_tokens,
        peft_config=lora_config(training.rank),
        callbacks=[callback],
        train_dataset=Dataset.from_dict({"prompt": conversations}),
    )
