"""Worker extension for `--apply merge`; replaces `extension.AdapterWorker`."""

from __future__ import annotations

import threading
from typing import Any

import torch

from rollout_server.ipc.server import Acknowledge
from rollout_server.vllm_compat import versions
from rollout_server.worker.extension import Operations, listen
from rollout_server.worker.merged_writer import MergedWriter

# vLLM imports this module in each worker process before it loads the model.
versions.keep_linear_weights_on_cpu()


class MergeWorker:
    """Mixin of vLLM's worker class. The prefix of its names keeps them apart from vLLM's."""

    def lockstep_register(self, keep_base: Any, link: dict[str, Any]) -> tuple[str, int, str] | None:
        """Find the linear layers and `listen`; called once, after vLLM's own warm-up."""
        with torch.inference_mode():
            writer = MergedWriter(self, keep_base)
        return listen(MergeOperations(self, writer), link)


class MergeOperations(Operations):
    """Operations of a merging worker: `fill` only receives and verifies; `apply` changes the weights."""

    def __init__(self, worker: Any, writer: MergedWriter) -> None:
        super().__init__(worker, writer)
        self.applying = threading.Lock()

    def apply(self, _: Acknowledge, checksum: str | None) -> dict[str, Any]:
        """Set the weights to W0 plus a received adapter, or to W0; the engine is paused. Return what arrived."""
        with self.applying, self._on_own_stream():
            if self.stream is not None:
                torch.cuda.synchronize(self.device)  # no kernel of the engine may still read the weights
            self.writer.apply(checksum)
            return {"arrived": list(self.writer.arrived)}
