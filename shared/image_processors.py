"""Processors of vision models without torchvision: images need PIL only, and videos, which nobody sends, need more."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

#: Settings that say how a model is computed, loaded or named, not what it sees; so do names that end in `_type`.
_OTHERS = frozenset(
    {
        *("architectures", "auto_map", "data_format", "device", "disable_grouping", "dtype", "initializer_range"),
        *("input_data_format", "processor_class", "return_tensors", "torch_dtype", "transformers_version"),
        *("id2label", "label2id"),
    }
)


def sight(processor: Any, config: Any) -> dict[str, str]:
    """Return what decides what a model sees of an image: settings by their names, as JSON.

    Args:
        processor: transformers' processor of images; config: the model's configuration.
    """
    parts = {"image_processor": processor, "vision_config": getattr(config, "vision_config", None)}
    return {
        name: json.dumps(value, default=str)
        for part, settings in parts.items()
        for name, value in _flat(part, settings.to_dict() if settings is not None else {})
    }


def other_sight(own: Mapping[str, str], served: Mapping[str, str]) -> list[str]:
    """Return which settings two sides have otherwise; some versions of transformers know more than others."""
    return [f"{name} is {own[name]}, not {served[name]}" for name in own if served.get(name, own[name]) != own[name]]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        if inner is not None and key not in _OTHERS and not key.startswith("_") and not key.endswith("_type"):
            yield from _flat(f"{name}.{key}", inner)


def do_without_videos(transformers: ModuleType) -> None:
    """Let processors load where what they need for videos alone is missing (transformers 5.17 to 5.19).

    Without torchvision, transformers refuses to make the part for videos that processors of many models of images
    take. SmolVLM's asks for num2words, which writes a video's number of frames.
    """
    smolvlm: Any = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    smolvlm.num2words = smolvlm.num2words or str
    if importlib.util.find_spec("torchvision") is not None:
        return

    class BaseVideoProcessor(dict[str, Any]):  # of settings, of which it has none: processors save their parts' as JSON
        """Stands for the part that processes videos."""

        model_input_names: tuple[str, ...] = ()
        merge_size = temporal_patch_size = num_frames = fps = 1
        _auto_class = None
        valid_kwargs = transformers.processing_utils.VideosKwargs
        size: ClassVar[dict[str, int]] = {"shortest_edge": 2**10, "longest_edge": 2**14}  # with room for a patch

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> BaseVideoProcessor:
            return cls()

        @classmethod
        def register(cls, *args: Any, **kwargs: Any) -> None:
            """Know no custom classes."""

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            """Have nothing to save."""

        def to_dict(self) -> dict[str, Any]:
            return {}

    utils = transformers.processing_utils
    utils.MODALITY_TO_AUTOPROCESSOR_MAPPING["video_processor"].from_pretrained = BaseVideoProcessor.from_pretrained
    for module in (transformers, utils.transformers_module):  # processors look their parts up in a second instance
        for name in ("VideoProcessorMixin", "BaseVideoProcessor"):
            setattr(module, name, BaseVideoProcessor)
