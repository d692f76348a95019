"""Attention over packed segments, as an implementation that transformers can be told to use.

GPUs run torch's variable-length FlashAttention (arXiv:2307.08691); other devices run one scaled dot product a segment.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from learner.passes.packing import PackedPass, Segment

#: The name in `config._attn_implementation`.
PACKED = "lockstep_packed"
#: Arguments of other attentions: windows, attention sinks, a cap of the logits.
_NOT_COMPUTED = ("sliding_window", "s_aux", "softcap")
#: torch 2.11 does not.
_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def arguments(packed: PackedPass) -> dict[str, Any]:
    """Return what `attend` needs, as keyword arguments of the model's forward."""
    device, segments = packed.input_ids.device, packed.segments
    if device.type != "cuda":
        return {"packed_segments": [(segment, _mask(segment, device)) for segment in segments]}
    lengths = [(s.stop - s.start, s.prefix_length + s.stop - s.start) for s in segments]
    cumulative = torch.tensor([(0, 0), *lengths], device=device).cumsum(0).to(torch.int32)
    keys = None
    if any(segment.prefix_length for segment in segments):
        index: list[int] = []
        for s in segments:
            index += range(s.prefix, s.prefix + s.prefix_length)
            index += range(s.start, s.stop)
        keys = torch.tensor(index, device=device)
    return {
        "cu_seq_lens_q": cumulative[:, 0].contiguous(),
        "cu_seq_lens_k": cumulative[:, 1].contiguous(),
        "max_length_q": max(q for q, _ in lengths),
        "max_length_k": max(k for _, k in lengths),
        "packed_keys": keys,
    }


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    packed_segments: list[tuple[Segment, torch.Tensor | None]] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention over the segments of one pass. The signature is transformers'.

    Args:
        query: [1, heads, N, head size].
        key, value: [1, key heads, N, head size].

    Returns:
        [1, N, heads, head size], and no attention weights.

    Raises:
        ValueError: the model asks for more than causal attention.
    """
    if asked := [name for name in _NOT_COMPUTED if others.get(name) is not None]:
        raise ValueError(f"packed attention does not compute {', '.join(asked)}")
    if packed_segments is None:
        return _varlen(query, key, value, scaling, **others)[None], None
    parts = []
    for s, mask in packed_segments:
        keys, values = (
            torch.cat([each[:, :, s.prefix : s.prefix + s.prefix_length], each[:, :, s.start : s.stop]], 2)
            if s.prefix_length
            else each[:, :, s.start : s.stop]
            for each in (key, value)
        )
        own = query[:, :, s.start : s.stop]
        parts.append(
            scaled_dot_product_attention(
                own, keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=_grouped(query, key)
            )
        )
    return torch.cat(parts, 2).transpose(1, 2), None


def _grouped(query: torch.Tensor, key: torch.Tensor) -> bool:
    return bool(key.size(1) != query.size(1))  # of numbers also where torch traces with symbols


def _mask(segment: Segment, device: torch.device) -> torch.Tensor | None:
    """Return which keys each query sees, [own, prefix + own]; None for plain causal attention."""
    own = segment.stop - segment.start
    if not segment.prefix_length:
        return None
    ones = torch.ones(own, segment.prefix_length + own, dtype=torch.bool, device=device)
    return ones.tril(segment.prefix_length)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    packed_keys: torch.Tensor | None,
    **_: Any,
) -> torch.Tensor:
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    if packed_keys is not None:
        key, value = key.index_select(0, packed_keys), value.index_select(0, packed_keys)
    return causal_varlen(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scaling)


def causal_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute causal attention of sequences that lie one after the other, on a GPU: torch's kernel.

    Args:
        query: [N, heads, head size]; the last query of a sequence sees all of its keys.
        key, value: [K, key heads, head size].
        cu_seq_lens_q, cu_seq_lens_k: int32 [sequences + 1], where they begin and end.
    """
    options: dict[str, Any] = {"scale": scale}
    if _KNOWS_GQA:
        options["enable_gqa"] = _grouped(query, key)
    else:
        key, value = (each.repeat_interleave(query.size(1) // key.size(1), 1) for each in (key, value))
    return varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, window_size=(-1, 0), **options
    )


def _no_mask(*_: Any, **__: Any) -> None:
    """Make no mask: `attend` knows the segments."""


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, _no_mask)
