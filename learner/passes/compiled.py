"""Decoder layers compiled by torch: fewer, larger kernels for norms, rotary embeddings, activations and casts.

All layers of a model share the code that is compiled once without and once with gradient, for passes of any length.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.passes.lora_product import write_adapters
from shared.messages import one_line

logger = logging.getLogger("lockstep.passes")


class CompiledLayers:
    """The decoder layers of a model, compiled when they are called next.

    A layer that cannot be compiled is computed as before, and so are all others from then on; the log says why.

    Args:
        backend: of `torch.compile`.

    Attributes:
        seconds: that first calls have taken, which is nearly all compilation.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        self.seconds = 0.0
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._seen: set[tuple[bool, bool]] = set()
        for layer in self._layers:
            # What `Module.compile` sets, too. Checkpointing stays around it, and hooks within.
            compiled = torch.compile(layer._call_impl, dynamic=True, backend=backend)
            layer._compiled_call_impl = self._written_before(layer, compiled)

    @property
    def active(self) -> bool:
        """Whether they are compiled."""
        return any(layer._compiled_call_impl is not None for layer in self._layers)

    def undo(self) -> None:
        """Compute as before."""
        for layer in self._layers:
            layer._compiled_call_impl = None

    def _written_before(self, layer: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            write_adapters(layer)
            kind = torch.is_grad_enabled(), layer.training
            if kind in self._seen:
                return compiled(*args, **kwargs)
            began = time.perf_counter()
            try:
                result = compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.undo()
                logger.warning("layers are not compiled: %s", one_line(error))
                return layer._call_impl(*args, **kwargs)
            self._seen.add(kind)
            with suppress(RuntimeError):
                torch.accelerator.synchronize()
            self.seconds += time.perf_counter() - began
            return result

        return call
