"""Peer: TRL's `AsyncGRPOTrainer`: a plain `vllm serve`, adapters through files, torch's kernel for its attention.

TRL fetches FlashAttention 3 from the hub, where benches are not. It calls it in one place, with one signature.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerBase, TrainerCallback

from bench.common.servers import Server, Setting
from bench.contenders.vllm_adapter_files import serve_adapters
from learner.passes.attention import causal_varlen

NOTE = (
    "TRL's AsyncGRPOTrainer with its own max_staleness and adapters through local files, its fixed number of "
    "completions a micro-batch; attention by torch.nn.attention.varlen (on a CPU by scaled dot products) in place of "
    "the hub's FlashAttention 3"
)
#: Its worker takes conversations only. This one's tokens are those of a prompt that is text.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
#: None that can be read: TRL then takes an answer as plain text.
RESPONSE_TEMPLATE: dict[str, Any] = {}


def serve(
    setting: Setting, folder: Path, max_rank: int, *, max_staleness: int, stop_token_ids: Sequence[int] | None = None
) -> Server:
    """Start the server that the trainer needs; it need not be ready.

    Args:
        max_staleness: requests may name one version more than that, and a sync loads the next one before it unloads
            the oldest.
        stop_token_ids: the trainer's requests have none, so that they come as further EOS ids of the model. None: those
            that the model has.
    """
    flags = ["--max-loras", str(max_staleness + 2), "--max-lora-rank", str(max_rank)]
    # As the trainer computes them, with the temperature, and as `trl vllm-serve` has it.
    flags += ["--logprobs-mode", "processed_logprobs"]
    # On a CPU vLLM 0.32 ends where a prompt is computed in parts for a request with a seed, as the trainer's are.
    flags += ["--no-enable-chunked-prefill"] if setting.device == "cpu" else []
    if stop_token_ids is not None:
        generation = setting.work / "generation"
        generation.mkdir(exist_ok=True)
        (generation / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *stop_token_ids]}))
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


def make_trainer(
    folder: str,
    make_args: Callable[[type[Any]], Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_funcs: Any,
    peft_config: LoraConfig | None,
    callback: TrainerCallback,
) -> Any:
    """Return an AsyncGRPOTrainer of the model in a folder.

    Args:
        make_args: gets the class of the trainer's options, and makes them.
        dataset: whose prompts are conversations or texts.
    """
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    use_torch_attention(packing)
    if not torch.cuda.is_available():  # it would ask for the name of a GPU
        async_grpo_trainer.get_peak_flops_per_device = lambda accelerator, dtype: None
    tokenizer.response_template = RESPONSE_TEMPLATE
    if isinstance(dataset[0]["prompt"], str):
        tokenizer.chat_template = CHAT_TEMPLATE
        dataset = as_conversations(dataset)
    return AsyncGRPOTrainer(
        model=folder,
        processing_class=tokenizer,
        args=make_args(AsyncGRPOConfig),
        reward_funcs=reward_funcs,
        peft_config=peft_config,
        callbacks=[callback],
        train_dataset=dataset,
    )


def as_conversations(dataset: Dataset) -> Dataset:
    """Return a dataset whose prompts, which are texts, are messages of users."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in dataset["prompt"]]
    made = dataset.add_column("conversation", conversations)
    return made.remove_columns("prompt").rename_column("conversation", "prompt")
