"""Worker extension for `--apply columns`; replaces `extension.AdapterWorker`."""

from __future__ import annotations

from rollout_server.vllm_compat import lora_columns, versions
from rollout_server.worker.extension import AdapterWorker

# vLLM imports this module in each worker process before it loads the model.
versions.keep_linear_weights_on_cpu()
lora_columns.install()


class ColumnsWorker(AdapterWorker):
    """Mixin of vLLM's worker class whose slots lie in the columns of the weights."""
