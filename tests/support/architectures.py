"""Tiny random models of the architectures that Lockstep is tried with, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.support.tiny_model import make_tiny_tokenizer
from tests.support.tiny_vision_model import GATED_DELTA

Kind = Literal["dense", "hybrid", "multimodal", "mixture"]
VOCAB = 512
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,  # some have no other size of heads than this by their number
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
_GEMMA_4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "tie_word_embeddings": True,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
_QWEN3_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model.

    Attributes:
        name: of transformers' class, as checkpoints name it.
        config: name of its configuration's class.
        text: settings of the language model, beside or instead of the common ones.
        parts: settings of the whole model, for those that have more parts than a language model.
        sees: `model_type` of the tiny model that is tried with images (`tests.support.tiny_vision_model`); "": none.
    """

    name: str
    config: str
    kind: Kind = "dense"
    text: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] | None = None
    sees: str = ""

    @property
    def dtype(self) -> str:
        """Of what is served: vLLM's CPU backend computes gated delta nets in bfloat16 only."""
        return "bfloat16" if "linear_num_key_heads" in self.text else "float32"


#: Row of the table of models -> its architecture.
ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig"),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config"),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config"),
    "Qwen3, tied": Architecture("Qwen3ForCausalLM", "Qwen3Config", text={"tie_word_embeddings": True}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", "Gemma2Config", text=_GEMMA),
    "Gemma 3, text": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", text=_GEMMA),
    # As the smallest ones are: embeddings of their own in each layer, keys and values shared by the last layers.
    "Gemma 4, text": Architecture("Gemma4ForCausalLM", "Gemma4TextConfig", text=_GEMMA_4),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig"),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config"),
    "OLMo 2": Architecture("Olmo2ForCausalLM", "Olmo2Config"),
    "OLMo 3": Architecture("Olmo3ForCausalLM", "Olmo3Config", text={"sliding_window": 8}),
    "GLM-4": Architecture("Glm4ForCausalLM", "Glm4Config"),
    "SmolLM3": Architecture("SmolLM3ForCausalLM", "SmolLM3Config"),
    "Granite": Architecture("GraniteForCausalLM", "GraniteConfig"),
    "Qwen3-Next": Architecture(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        "hybrid",
        text={**GATED_DELTA, **_EXPERTS, "mlp_only_layers": [0], "shared_expert_intermediate_size": 32},
    ),
    "Qwen3.5, text": Architecture("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", "hybrid", text=GATED_DELTA),
    "Qwen2-VL": Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        "multimodal",
        text={"rope_parameters": _MROPE},
        parts={
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2, "num_heads": 2},
            **_QWEN_TOKENS,
        },
        sees="qwen2_vl",
    ),
    "Qwen2.5-VL": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        "multimodal",
        text={"rope_parameters": _MROPE},
        parts={
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_TOKENS,
        },
        sees="qwen2_5_vl",
    ),
    "Qwen3-VL": Architecture(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        "multimodal",
        text={"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        parts={"vision_config": {**_QWEN3_VISION, "deepstack_visual_indexes": [0]}, **_QWEN_TOKENS},
        sees="qwen3_vl",
    ),
    "Qwen3.5": Architecture(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        "multimodal",
        text=GATED_DELTA,
        parts={"vision_config": _QWEN3_VISION, **_QWEN_TOKENS},
        sees="qwen3_5",
    ),
    "Gemma 3": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        "multimodal",
        text=_GEMMA,
        parts={
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 502,
            "eoi_token_index": 503,
            "image_token_index": 500,
        },
        sees="gemma3",
    ),
    "Gemma 4": Architecture(
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        "multimodal",
        text=_GEMMA_4,
        parts={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            "audio_config": None,
            "image_token_id": 500,
            "boi_token_id": 502,
            "eoi_token_id": 503,
        },
    ),
    "SmolVLM": Architecture(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        "multimodal",
        text={"model_type": "llama"},
        parts={"vision_config": _SIGLIP, "scale_factor": 2, "image_token_id": 500},
        sees="smolvlm",
    ),
    "LLaVA": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        "multimodal",
        text={"model_type": "llama"},
        parts={"vision_config": {"model_type": "clip_vision_model", **_SIGLIP}, "image_token_id": 500},
        sees="llava",
    ),
    "Mistral 3": Architecture(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        "multimodal",
        text={"model_type": "mistral"},
        parts={
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 16,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 500,
        },
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM", "GptOssConfig", "mixture", text={"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "Qwen3-MoE": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "mixture", text=_EXPERTS),
    "Qwen2-MoE": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        "mixture",
        text={**_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "Mixtral": Architecture(
        "MixtralForCausalLM", "MixtralConfig", "mixture", text={"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
}


def make_model(row: str, directory: Path, *, seed: int = 0) -> Path:
    """Write a random model of an architecture, and a tokenizer, to `directory`, and return it."""
    import torch
    import transformers

    architecture = ARCHITECTURES[row]
    tokenizer = make_tiny_tokenizer(VOCAB)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = _TEXT | ids | architecture.text
    make: Callable[..., Any] = getattr(transformers, architecture.config)
    if architecture.parts is None:
        config = make(**text)
    else:
        config = make(text_config=text, **architecture.parts, tie_word_embeddings=text["tie_word_embeddings"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture.name)(config).float()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
