"""Small random models that see images, with their processors, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tiny_model import make_tiny_tokenizer

#: Pixels on a side of what becomes one token of a Qwen2.5-VL.
TOKEN_PIXELS = 28
_VOCAB = 512
_QWEN_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
#: Of an image that is cut into tiles.
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
_SMOLVLM_SPECIALS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *_TILES)

#: Of layers that are gated delta nets, the first of two.
GATED_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
_GEMMA_SPECIALS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def make_tiny_vision_model(
    directory: str | Path, family: str = "qwen2_5_vl", *, seed: int = 0, std: float = 0.2
) -> Path:
    """Write a random model in float32 and its processor to `directory`, and return it."""
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText

    from shared.image_processors import do_without_videos

    do_without_videos(transformers)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    place, specials, make = _FAMILIES[family]
    tokenizer = make_tiny_tokenizer(_VOCAB)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": std,
        "tie_word_embeddings": False,
        **ends,
    }
    config, processor = make(tokenizer, text, {"initializer_range": std}, ends, chat_template(place))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # of Gemma 3, zeros
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(directory)
    if family in ("llava", "gemma3"):
        _name_as_published(directory / "model.safetensors")
    processor.save_pretrained(directory)
    return directory


def _name_as_published(path: Path) -> None:
    """Give the vision tower the names of published files; transformers reads both, and writes others."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def chat_template(place: str) -> str:
    """Return ChatML's, with `place` where a message has an image."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + place + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _qwen_images(patch: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = (2 * patch) ** 2
    size = {"shortest_edge": 4 * pixels, "longest_edge": 64 * pixels}
    return Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)


def _qwen_tokens(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(_QWEN_SPECIALS)), strict=True))


def _qwen2_vl(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            **vision,
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 64,
            "mlp_ratio": 1,
            "num_heads": 2,
            "patch_size": TOKEN_PIXELS // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **_qwen_tokens(tokenizer),
        tie_word_embeddings=False,
        **ends,
    )
    images, videos = _qwen_images(TOKEN_PIXELS // 2), transformers.BaseVideoProcessor()
    return config, transformers.Qwen2VLProcessor(images, tokenizer, videos, chat)


def _qwen2_5_vl(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            **vision,
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": TOKEN_PIXELS // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * TOKEN_PIXELS,
            "fullatt_block_indexes": [1],
        },
        **_qwen_tokens(tokenizer),
        tie_word_embeddings=False,
        **ends,
    )
    images, videos = _qwen_images(TOKEN_PIXELS // 2), transformers.BaseVideoProcessor()
    return config, transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat)


def _qwen3_vl(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            **vision,
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_qwen_tokens(tokenizer),
        tie_word_embeddings=False,
        **ends,
    )
    return config, transformers.Qwen3VLProcessor(_qwen_images(16), tokenizer, transformers.BaseVideoProcessor(), chat)


def _qwen3_5(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = transformers.Qwen3_5Config(
        text_config={**text, **GATED_DELTA, "rope_parameters": {**rope, "partial_rotary_factor": 0.5}},
        vision_config={
            **vision,
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
        },
        **_qwen_tokens(tokenizer),
        tie_word_embeddings=False,
        **ends,
    )
    return config, transformers.Qwen3VLProcessor(_qwen_images(16), tokenizer, transformers.BaseVideoProcessor(), chat)


def _smolvlm(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    config = transformers.SmolVLMConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={
            **vision,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        **ends,
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    videos = transformers.BaseVideoProcessor()
    return config, transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=chat)


def _llava(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = transformers.LlavaConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={
            **vision,
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 32,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **ends,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=chat,
        num_additional_image_tokens=1,
    )
    return config, processor


def _gemma3(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], ends: dict[str, Any], chat: str) -> Any:
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = dict(zip(("boi_token", "eoi_token", "image_token"), _GEMMA_SPECIALS, strict=True))
    ends_named = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, extra_special_tokens=named, model_max_length=2048, **ends_named
    )
    config = transformers.Gemma3Config(
        text_config={**text, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        vision_config={
            **vision,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
        **ends,
    )
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return config, transformers.Gemma3Processor(images, tokenizer, chat_template=chat, image_seq_length=4)


#: Family -> what its chat template writes for an image, further tokens, and how config and processor are made.
_FAMILIES: dict[str, tuple[str, tuple[str, ...], Callable[..., Any]]] = {
    "qwen2_vl": ("<|vision_start|><|image_pad|><|vision_end|>", _QWEN_SPECIALS, _qwen2_vl),
    "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", _QWEN_SPECIALS, _qwen2_5_vl),
    "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", _QWEN_SPECIALS, _qwen3_vl),
    "qwen3_5": ("<|vision_start|><|image_pad|><|vision_end|>", _QWEN_SPECIALS, _qwen3_5),
    "smolvlm": ("<image>", _SMOLVLM_SPECIALS, _smolvlm),
    "llava": ("<image>", ("<image>",), _llava),
    "gemma3": ("<start_of_image>", (*_GEMMA_SPECIALS, *("\n" * count for count in range(1, 5))), _gemma3),
}
