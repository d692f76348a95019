"""Checkpoints with the shapes of published models, random weights, and a tokenizer and processor without a download."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MAX_POSITION = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A model that sees images, by its configuration.

    Attributes:
        architecture, model_type: as config.json names them.
        processor, image_processor: names of transformers' classes.
        text, vision: settings of the language model and of the part that sees.
    """

    name: str
    architecture: str
    model_type: str
    processor: str
    image_processor: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]

    def config(self, dtype: str) -> dict[str, Any]:
        """Return the content of config.json."""
        ids = {name: self._id(token) for name, token in _TOKEN_IDS.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "text_config": {
                "model_type": f"{self.model_type}_text",
                "max_position_embeddings": _MAX_POSITION,
                "dtype": dtype,
                **ids,
                **self.text,
            },
            "vision_config": {"model_type": f"{self.model_type}_vision", **self.vision},
            "image_token_id": self._id("<|image_pad|>"),
            "video_token_id": self._id("<|video_pad|>"),
            "vision_start_token_id": self._id("<|vision_start|>"),
            "vision_end_token_id": self._id("<|vision_end|>"),
            "tie_word_embeddings": self.text["tie_word_embeddings"],
            "dtype": dtype,
            **ids,
        }

    def write(self, folder: Path, device: str, dtype: str) -> Path:
        """Write a directory with weights, made on `device`, that both sides load; return it."""
        import transformers

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(dtype), indent=1))
        self._write_tokenizer(folder)
        patch, merge = self.vision["patch_size"], self.vision["spatial_merge_size"]
        pixels = (patch * merge) ** 2
        images = {
            "processor_class": self.processor,
            "image_processor_type": self.image_processor,
            "patch_size": patch,
            "merge_size": merge,
            "temporal_patch_size": self.vision["temporal_patch_size"],
            "size": {"shortest_edge": 4 * pixels, "longest_edge": 16384 * pixels},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=1))
        config = transformers.AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(transformers, self.architecture)._from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.config(dtype), indent=1))  # not as this version writes it
        (folder / "generation_config.json").unlink(missing_ok=True)
        return folder

    def _id(self, token: str) -> int:
        return int(self.text["vocab_size"]) - len(_SPECIALS) + _SPECIALS.index(token)

    def _write_tokenizer(self, folder: Path) -> None:
        """Write a tokenizer of bytes, with a text for every other id, too."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*letters, *(f"t{i}" for i in range(len(letters), self.text["vocab_size"] - len(_SPECIALS)))]
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate([*words, *_SPECIALS])}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=list(_SPECIALS),
            model_max_length=_MAX_POSITION,
        )
        fast.chat_template = _CHAT_TEMPLATE
        fast.save_pretrained(folder)

    @property
    def parameters(self) -> int:
        """Number of weights, counted without any."""
        import transformers

        with torch.device("meta"):
            kind = getattr(transformers, self.architecture)
            model = kind(kind.config_class.from_dict(self.config("bfloat16")))
        return sum(math.prod(parameter.shape) for parameter in model.parameters())


_TOKEN_IDS = {"eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
_PATCHES = {"spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_5_vl(name: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        name,
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        "Qwen2_5_VLProcessor",
        "Qwen2VLImageProcessor",
        text,
        {**_PATCHES, "patch_size": 14, "window_size": 112, **vision},
    )


def _qwen3_5(name: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        name,
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessor",
        text,
        {**_PATCHES, "patch_size": 16, **vision},
    )


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), **more}


_GATED_DELTA = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
CHECKPOINTS: dict[str, Checkpoint] = {
    each.name: each
    for each in (
        _qwen2_5_vl(
            "qwen2.5-vl-3b",
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6,
                "rope_parameters": _mrope(16, 24, 24, rope_theta=1e6),
                "tie_word_embeddings": True,
            },
            {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
            },
        ),
        _qwen3_5(
            "qwen3.5-4b",
            {
                "vocab_size": 248320,
                "hidden_size": 2560,
                "intermediate_size": 9216,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "full_attention_interval": 4,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                **_GATED_DELTA,
                "rope_parameters": _mrope(
                    11, 11, 10, mrope_interleaved=True, rope_theta=1e7, partial_rotary_factor=0.25
                ),
                "tie_word_embeddings": True,
            },
            {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "num_position_embeddings": 2304,
            },
        ),
        _qwen2_5_vl(
            "tiny qwen2.5-vl",
            {
                "vocab_size": 512,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": _mrope(4, 6, 6, rope_theta=1e4),
                "tie_word_embeddings": True,
            },
            {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            },
        ),
        _qwen3_5(
            "tiny qwen3.5",
            {
                "vocab_size": 512,
                "hidden_size": 128,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "full_attention_interval": 2,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                **_GATED_DELTA,
                "rope_parameters": _mrope(2, 3, 3, mrope_interleaved=True, rope_theta=1e4, partial_rotary_factor=0.5),
                "tie_word_embeddings": True,
            },
            {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "num_position_embeddings": 16,
            },
        ),
    )
}
