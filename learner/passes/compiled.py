"""Decoder layers compiled by torch: fewer, larger kernels for norms, rotary embeddings and activations."""

from __future__ import annotations

from typing import Any

import torch


def compile_layers(model: Any) -> int:
    """Compile every decoder layer for tensors of any length, at its first call; return their number.

    Args:
        model: of transformers, without its PEFT wrapper.
    """
    layers = model.get_decoder().layers
    # One entry serves all layers; passes with and without gradient, with and without shared prompts have their own.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
