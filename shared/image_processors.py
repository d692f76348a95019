"""Processors of vision models without torchvision: images need PIL only, and videos, which nobody sends, need more."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any, ClassVar


def do_without_videos(transformers: ModuleType) -> None:
    """Let processors load where torchvision is missing; no effect elsewhere (transformers 5.17 to 5.19).

    Processors of many models of images take a part for videos, which transformers refuses to make then.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return

    class BaseVideoProcessor(dict[str, Any]):  # of settings, of which it has none: processors save their parts' as JSON
        """Stands for the part that processes videos."""

        model_input_names: tuple[str, ...] = ()
        merge_size = temporal_patch_size = 1
        _auto_class = None
        valid_kwargs = transformers.processing_utils.VideosKwargs
        size: ClassVar[dict[str, int]] = {"shortest_edge": 1, "longest_edge": 1}

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
