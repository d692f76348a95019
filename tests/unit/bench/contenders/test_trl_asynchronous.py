"""TRL's asynchronous trainer in bench.step: its attention's stand-in, and conversations that are prompts."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import scaled_dot_product_attention

from bench.common.models import SHAPES
from bench.contenders.trl_asynchronous import (
    CHAT_TEMPLATE,
    RESPONSE_TEMPLATE,
    as_conversations,
    flash_attn_varlen_func,
    use_torch_attention,
)

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def trls_packing() -> Any:
    """Return TRL's module without its package, which imports vLLM."""
    package = importlib.util.find_spec("trl.experimental.async_grpo")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "packing.py")
    spec = importlib.util.spec_from_file_location("trls_packing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trls_tree_attention_is_causal_attention_of_every_sample() -> None:
    packing = trls_packing()
    use_torch_attention(packing)
    samples = [[3, 4, 5, 6, 7], [3, 4, 5, 8], [9, 10]]  # two of which begin alike
    row = packing.TreeRow()
    for number, ids in enumerate(map(torch.tensor, samples)):
        of_tokens = {"input_ids": ids, "completion_mask": torch.ones_like(ids), "old_log_probs": torch.zeros(len(ids))}
        row.add({**of_tokens, "group_id": number, "advantage": 0.0})
    packed = row.pack()
    assert packed["input_ids"].numel() < sum(map(len, samples))
    torch.manual_seed(0)
    table = torch.randn(16, 3, HEADS, SIZE)  # what a token asks, offers and holds
    heads = HEADS, KEY_HEADS, KEY_HEADS

    def asked(ids: Any) -> list[torch.Tensor]:
        return [table[ids, i, :count].transpose(0, 1)[None] for i, count in enumerate(heads)]

    tree = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    tree["tree_max_seqlen_q"], tree["tree_max_seqlen_k"] = packed["tree_max_seqlens"].tolist()
    module: Any = torch.nn.Linear(1, 1)
    module.config = Namespace()
    attended, _ = packing.tree_attention(module, *asked(packed["input_ids"]), None, scaling=0.3, **tree)
    for number, sample in enumerate(samples):
        alone = scaled_dot_product_attention(*asked(sample), is_causal=True, scale=0.3, enable_gqa=True)
        # Where the loss reads: at all tokens but the last.
        places = packed["token_index"][packed["segment_id"] == number]
        torch.testing.assert_close(attended[0, places], alone[0].transpose(0, 1)[:-1])


def test_attention_of_another_kind_is_refused() -> None:
    q = torch.zeros(1, 1, 8)
    cu = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="only full causal"):
        flash_attn_varlen_func(q, q, q, cu, cu, 1, 1, softmax_scale=1.0, causal=True, window_size=(3, 0))


def test_prompts_become_conversations_beside_the_other_columns() -> None:
    made = as_conversations(Dataset.from_dict({"prompt": ["1 + 2 =", "3 + 4 ="], "answer": ["3", "7"]}))
    assert list(made)[1] == {"answer": "7", "prompt": [{"role": "user", "content": "3 + 4 ="}]}
    assert len(as_conversations(Dataset.from_dict({"prompt": ["1 + 2 =", "3 + 4 ="]}))) == 2


def test_a_conversation_is_its_prompts_tokens() -> None:
    from trl.chat_template_utils import parse_response

    tokenizer = SHAPES["tiny"].tokenizer()
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    message = [{"role": "user", "content": "t3 t4 t77"}]
    ids = tokenizer.apply_chat_template(message, return_dict=False, add_generation_prompt=True)
    assert ids == [3, 4, 77]
    assert parse_response(tokenizer, [5, 6, 0], prefix=ids) == {"role": "assistant", "content": "t5 t6"}
