"""A small random model that sees images, with its processor: a Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_model import make_tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Pixels on a side of what becomes one token.
TOKEN_PIXELS = 28
_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_tiny_vision_model(directory: str | Path, *, seed: int = 0, std: float = 0.2) -> Path:
    """Write a random model in float32 and its processor to `directory`, and return it."""
    import torch
    import transformers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from shared.image_processors import do_without_videos

    do_without_videos(transformers)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIALS)})
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(_SPECIALS))
    pixels = TOKEN_PIXELS**2
    images = Qwen2VLImageProcessorPil(
        patch_size=TOKEN_PIXELS // 2,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * pixels, "longest_edge": 64 * pixels},
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "initializer_range": std,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
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
            "initializer_range": std,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.save_pretrained(directory)
    Qwen2_5_VLProcessor(images, tokenizer, transformers.BaseVideoProcessor(), CHAT_TEMPLATE).save_pretrained(directory)
    return directory
