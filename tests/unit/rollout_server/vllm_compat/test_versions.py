"""What is read of vLLM's private parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.tokenizers import hf
from vllm.v1.engine.logprobs import LogprobsProcessor

from rollout_server.generation.tokenization import tokenize
from rollout_server.vllm_compat.versions import (
    begun_blocks,
    copy_tokenizer,
    leave_flat_logprobs_without_text,
    zero_begun_blocks,
)
from shared.rollouts import Prompt
from tests.support.tiny_model import make_tiny_tokenizer

SHOWN = "{{ messages[0].content }}"


def _model_config(folder: Path, **options: Any) -> Any:
    return SimpleNamespace(tokenizer=str(folder), tokenizer_revision=None, **options)


def test_our_thread_has_a_tokenizer_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM's pool has one for each of its threads: whoever comes next would copy one, and may be the event loop."""
    pool = hf.maybe_make_thread_pool(hf.get_cached_tokenizer(make_tiny_tokenizer()), 2)
    ours = copy_tokenizer(SimpleNamespace(get_tokenizer=lambda: pool, model_config=_model_config(tmp_path)))
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied while requests are served"))
    text, messages = "the quick, brown fox", [{"role": "user", "content": "hello"}]
    assert ours(text)["input_ids"] == pool(text)["input_ids"]
    assert ours.max_chars_per_token == pool.max_chars_per_token
    if pool.chat_template:
        assert ours.apply_chat_template(messages, tokenize=False) == pool.apply_chat_template(messages, tokenize=False)
    assert not isinstance(ours, hf.ThreadSafeHFTokenizerMixin), "no pool of its own"


@pytest.mark.parametrize(("own", "sees", "used"), [(None, False, "P"), ("T", False, "T"), ("T", True, "P")])
def test_prompts_have_the_template_that_learners_use(tmp_path: Path, own: str | None, sees: bool, used: str) -> None:
    """Published processors of older versions have theirs in chat_template.json, which tokenizers do not read."""
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": f"P{SHOWN}"}))
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = own and f"{own}{SHOWN}"
    engines = hf.get_cached_tokenizer(tokenizer)
    options = SimpleNamespace(language_model_only=not sees)
    model = _model_config(tmp_path, is_multimodal_model=True, multimodal_config=options)
    ours = copy_tokenizer(SimpleNamespace(get_tokenizer=lambda: engines, model_config=model))
    asked = tokenize(ours, Prompt(messages=[{"role": "user", "content": "hello"}]), {}, 64)
    assert asked == ours(f"{used}hello")["input_ids"]
    assert engines.chat_template == (own and f"{own}{SHOWN}")


def test_a_server_without_tokenizer() -> None:
    def none() -> Any:
        raise ValueError("Tokenizer not available when `skip_tokenizer_init=True`")

    assert copy_tokenizer(SimpleNamespace(get_tokenizer=none)) is None


def test_flat_logprobs_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogprobsProcessor, "from_new_request", LogprobsProcessor.from_new_request)
    leave_flat_logprobs_without_text()
    tokenizer = make_tiny_tokenizer()

    def made(**params: Any) -> Any:
        request = SimpleNamespace(sampling_params=SamplingParams(**params))
        return LogprobsProcessor.from_new_request(tokenizer=tokenizer, request=request)

    assert made(logprobs=0, flat_logprobs=True).tokenizer is None
    assert made(logprobs=3, flat_logprobs=True).tokenizer is tokenizer
    assert made(logprobs=0).tokenizer is tokenizer
    assert made().tokenizer is tokenizer


def test_a_block_is_clean_when_a_sequence_begins_it() -> None:
    """Padding (-1) and blocks that a sequence goes on with are left alone."""

    class Attention:
        def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
            for slot in slot_mapping[slot_mapping >= 0].tolist():
                kv_cache[slot // 16, :, slot % 16] = 1.0

    zero_begun_blocks(Attention)
    kv_cache = torch.full((6, 2, 16, 8), torch.nan)  # [blocks, heads, tokens, width]
    Attention().do_kv_cache_update(None, None, None, kv_cache, torch.tensor([32, 33, 5 * 16 + 3, 64, -1, -1]))
    finite = [int(block.isfinite().sum()) for block in kv_cache]
    slot = kv_cache[0, :, 0].numel()
    assert finite == [0, 0, 16 * slot, 0, 16 * slot, slot]
    assert [int(kv_cache[block].sum()) for block in (2, 4)] == [2 * slot, slot]


def test_cuda_graphs_have_as_many_blocks_as_slots() -> None:
    slots = torch.tensor([32, 33, 5 * 16 + 3, 64, -1, -1])
    assert begun_blocks(slots, 16, fixed=False).tolist() == [2, 4]
    assert begun_blocks(slots, 16, fixed=True).tolist() == [2, 0, 0, 4, 0, 0]
