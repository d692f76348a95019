"""Decoder layers compiled by torch: fewer, larger kernels for norms, rotary embeddings, activations and casts.

All layers of a model share the code that is compiled once without and once with gradient, for passes of any length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as partitioning
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
        active: whether they are compiled, or will be.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._plain = [layer.forward for layer in self._layers]
        self._seen: set[tuple[bool, bool, str | None]] = set()
        self.active = True
        for layer, plain in zip(self._layers, self._plain, strict=True):
            # Checkpointing stays around it.
            layer.forward = self._written_before(layer, torch.compile(plain, dynamic=True, backend=backend), plain)

    def undo(self) -> None:
        """Compute as before."""
        self.active = False
        for layer, plain in zip(self._layers, self._plain, strict=True):
            layer.forward = plain

    def _written_before(
        self, layer: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            write_adapters(layer)
            # Layers with other attention are compiled apart.
            kind = torch.is_grad_enabled(), layer.training, getattr(layer, "attention_type", None)
            if kind in self._seen:
                return compiled(*args, **kwargs)
            try:
                # What is cheap to have again (normed inputs, gate times up, repeated keys and values) is not kept for
                # the backward pass, also where a product or attention reads it there: a third of the activations.
                with partitioning.patch(ban_recompute_materialized_backward=False):
                    result = compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.undo()
                logger.warning("layers are not compiled: %s", one_line(error))
                return plain(*args, **kwargs)
            self._seen.add(kind)
            return result

        return call
