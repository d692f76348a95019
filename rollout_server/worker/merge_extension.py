"""The worker's side of `--apply merge`; takes the place of `worker.AdapterWorker`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from rollout_server.ipc import server
from rollout_server.vllm_compat import versions
from rollout_server.worker.extension import Operations, listen

# vLLM imports this module in each worker process before it loads the model.
versions.keep_linear_weights_on_cpu()


class MergeWorker:
    """Mixed into vLLM's worker. Every name carries the prefix, so that it never meets one of vLLM's."""

    def lockstep_register(self, keep_base: Any, server_pid: int, folder: str) -> None:
        """Find the linear layers, and listen in `folder`; once, after vLLM's own warm-up."""
        from rollout_server.worker.merged_writer import MergedWriter

        with torch.inference_mode():
            writer = MergedWriter(self, keep_base)
        listen(MergeOperations(self, writer), server_pid, folder)


class MergeOperations(Operations):
    """`fill` only receives and verifies; `apply` changes the weights."""

    def __init__(self, worker: Any, writer: Any) -> None:
        super().__init__(worker, writer)
        self.applying = threading.Lock()

    def table(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Operations by name."""
        return super().table() | {"apply": self.apply}

    def apply(self, tell: server.Tell, checksum: str | None) -> dict[str, Any]:
        """Make the weights W0 plus a received adapter, or W0; the engine is paused."""
        with self.applying, self.on_own_stream():
            started = time.perf_counter()
            if self.stream is not None:
                torch.cuda.synchronize(self.device)  # no kernel of the engine may still read the weights
            modules = self.writer.apply(checksum)
        return {"ok": True, "modules": modules, "apply_seconds": time.perf_counter() - started}
