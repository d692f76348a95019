"""Refusals of servers, each with a word on what to do instead."""

from __future__ import annotations

import pytest

from learner.servers.compatibility import check_base, check_lengths, check_precision, check_server
from shared.errors import ErrorCode, LockstepError
from shared.weights import BaseFingerprint

BASE = BaseFingerprint(weights="a" * 32, tokenizer="b" * 32, chat_template="c" * 32)


@pytest.mark.parametrize(
    ("change", "word", "code"),
    [
        ({"ready": False}, "/ready", ErrorCode.NOT_READY),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs", ErrorCode.INVALID_REQUEST),
        ({"policy_altering": ["speculative decoding"]}, "allow_policy_altering", ErrorCode.INVALID_REQUEST),
        ({"policy_altering": ["kv_cache_dtype=fp8"]}, "kv_cache_dtype=fp8", ErrorCode.INVALID_REQUEST),
    ],
)
def test_server(server_state, change, word, code):
    check_server(server_state)
    with pytest.raises(LockstepError, match=word) as caught:
        check_server(server_state.model_copy(update=change))
    assert caught.value.code is code


def test_policy_altering_can_be_allowed(server_state):
    altering = server_state.model_copy(update={"policy_altering": ["speculation"]})
    check_server(altering, allow_policy_altering=True)
    check_server(altering.model_copy(update={"allowed_altering": True}))


def test_a_quantized_base_must_be_corrected_for(server_state):
    quantized = server_state.model_copy(update={"quantization": "fp8"})
    check_server(quantized)
    with pytest.raises(LockstepError, match=r"\(fp8\).*vllm_importance_sampling_correction"):
        check_server(quantized, corrected=False)
    check_server(server_state, corrected=False)
    assert "fp8" in check_precision("bfloat16", None, quantized)[0]
    assert check_precision("bfloat16", None, server_state) == []


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
@pytest.mark.parametrize("value", [None, "other"])
def test_base(part, value):
    assert check_base(BASE, BASE) == []
    other = BASE.model_copy(update={part: value})
    for pair in ((BASE, other), (other, BASE)):
        with pytest.raises(LockstepError, match=f"{part}.*allow_base_mismatch") as caught:
            check_base(*pair)
        assert caught.value.code is ErrorCode.BASE_MISMATCH
        assert len(check_base(*pair, allow_mismatch=True)) == 1


def test_unknown_bases_never_match():
    unknown = BASE.model_copy(update={"weights": None})
    with pytest.raises(LockstepError, match="cannot be fingerprinted"):
        check_base(unknown, unknown)


def test_another_chat_template_is_a_warning():
    assert "chat template" in check_base(BASE, BASE.model_copy(update={"chat_template": "x"}))[0]


def test_lengths(server_state):
    check_lengths(100, 28, server_state)
    check_lengths(None, 28, server_state)
    with pytest.raises(LockstepError, match="--max-model-len"):
        check_lengths(101, 28, server_state)
