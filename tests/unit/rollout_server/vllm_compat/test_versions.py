"""What is read of vLLM's private parts."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.tokenizers import hf
from vllm.v1.engine.logprobs import LogprobsProcessor

from rollout_server.vllm_compat.versions import copy_tokenizer, leave_flat_logprobs_without_text
from tests.support.tiny_model import make_tiny_tokenizer


def test_our_thread_has_a_tokenizer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's pool has one for each of its threads: whoever comes next would copy one, and may be the event loop."""
    pool = hf.maybe_make_thread_pool(hf.get_cached_tokenizer(make_tiny_tokenizer()), 2)
    ours = copy_tokenizer(SimpleNamespace(get_tokenizer=lambda: pool))
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied while requests are served"))
    text, messages = "the quick, brown fox", [{"role": "user", "content": "hello"}]
    assert ours(text)["input_ids"] == pool(text)["input_ids"]
    assert ours.max_chars_per_token == pool.max_chars_per_token
    if pool.chat_template:
        assert ours.apply_chat_template(messages, tokenize=False) == pool.apply_chat_template(messages, tokenize=False)
    assert not isinstance(ours, hf.ThreadSafeHFTokenizerMixin), "no pool of its own"


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
