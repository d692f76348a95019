"""Multimodal models load where torchvision is missing, as on CPUs (vLLM 0.26 to 0.33, transformers 5.17 to 5.19).

vLLM's models import transformers' processors of images that need torchvision, also where text alone is served. Each of
these has a sibling that needs only PIL, with the same functions and a class whose name ends in Pil.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PROCESSOR = re.compile(r"(transformers\.models\.\w+\.image_processing)_((?!pil_|utils)\w+)")


class _Siblings(MetaPathFinder, Loader):
    """Finds PIL's sibling under the name of a processor that needs torchvision."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        match = _PROCESSOR.fullmatch(name)
        sibling = match and f"{match[1]}_pil_{match[2]}"
        return ModuleSpec(name, self) if sibling and importlib.util.find_spec(sibling) else None

    def exec_module(self, module: ModuleType) -> None:
        match = _PROCESSOR.fullmatch(module.__name__)
        assert match
        for name, value in vars(importlib.import_module(f"{match[1]}_pil_{match[2]}")).items():
            if not name.startswith("__"):
                setattr(module, name.removesuffix("Pil"), value)


def do_without_torchvision() -> None:
    """Let multimodal models load without torchvision; no effect with it. Called in every process before one is loaded.

    vLLM finds out in a process of its own what a model can do, which would not know this: here it is this one.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    from vllm.model_executor.models import registry

    if not any(isinstance(finder, _Siblings) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Siblings())
    registry._run_in_subprocess = lambda look: look()
