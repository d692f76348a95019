"""Names of a multimodal checkpoint's language model, which files, transformers and vLLM put under different parents.

| | a layer of the language model |
| --- | --- |
| files: Qwen2.5-VL | `model.layers.0` |
| files: Gemma 3, Mistral 3, LLaVA; modules of vLLM | `language_model.model.layers.0` |
| files: Qwen3-VL, Qwen3.5; modules of transformers, and so of PEFT | `model.language_model.layers.0` |
| files and modules: SmolVLM | `model.text_model.layers.0` |
| modules of the language model, loaded alone | `model.layers.0` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Parts of a configuration that describe an encoder beside the language model.
ENCODERS = ("vision_config", "audio_config")
#: Modules of transformers that hold the language model of a multimodal model.
LANGUAGE_MODELS = ("language_model", "text_model")
_PARENTS = re.compile(rf"^(?:(?:model|{'|'.join(LANGUAGE_MODELS)})\.)+")
_ENCODER = re.compile(
    r"(?:^|\.)(?:visual|vision_\w+|image_\w+|audio_\w+|embed_vision|embed_audio|connector|(?:multi_modal|mm)_projector)(?:\.|$)"
)


def relative_name(name: str) -> str:
    """Return the name of a module or tensor without its parents, the same wherever it comes from.

    Example:
        assert relative_name("language_model.model.layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"
    """
    return _PARENTS.sub("", name)


def is_of_encoder(name: str) -> bool:
    """Return whether a module belongs to an encoder of images or sound, or to what ties one to the language model."""
    return _ENCODER.search(name) is not None


def encoders(config: Any) -> list[str]:
    """Return which of `ENCODERS` a model has, by its configuration: config.json, or an object of transformers."""
    given = config if isinstance(config, Mapping) else {part: getattr(config, part, None) for part in ENCODERS}
    return [part for part in ENCODERS if given.get(part) is not None]
