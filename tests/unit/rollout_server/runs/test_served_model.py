"""What a server says of the model that it serves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rollout_server.runs.served_model import describe
from rollout_server.settings import ServerSettings


@pytest.mark.parametrize("quantization", [None, "fp8", "bitsandbytes"])
def test_a_quantized_base_is_said(quantization):
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(),
        model="m",
        revision=None,
        dtype="bfloat16",
        max_model_len=128,
        logprobs_mode="processed_logprobs",
        quantization=quantization,
    )
    config = SimpleNamespace(
        model_config=model,
        lora_config=None,
        load_config=SimpleNamespace(load_format="dummy"),
        device_config=SimpleNamespace(device_type="cpu"),
        speculative_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    assert describe(config, [{"device": None}], 8, ServerSettings(apply="adapter"), "e").quantization == quantization
