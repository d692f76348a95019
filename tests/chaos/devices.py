"""Where learner and servers of a suite compute: on the CPU, on a GPU each, or both on the only GPU of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.utils.gpus import visible_gpus
from tests.chaos.surroundings import UnavailableError
from tests.support.arguments import arguments

#: Of a server's key-value cache. Its size is told, not found: who measures what is free, counts the learner on the GPU.
_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Devices:
    """CUDA_VISIBLE_DEVICES of the learner and of all servers; empty: they compute on the CPU."""

    learner: str = ""
    server: str = ""

    @classmethod
    def of_this_machine(cls) -> Devices:
        """Return the first visible GPU for the learner and the second, or else the first again, for the servers.

        Raises:
            UnavailableError: no GPU is visible.
        """
        gpus = [gpu.device for gpu in visible_gpus()]
        if not gpus:
            raise UnavailableError("no GPU is visible: see `nvidia-smi` and CUDA_VISIBLE_DEVICES")
        return cls(gpus[0], gpus[:2][-1])

    @property
    def on_gpu(self) -> bool:
        return bool(self.learner)

    @property
    def shared(self) -> bool:
        """Return whether learner and servers are on one GPU."""
        return self.on_gpu and self.learner == self.server

    @property
    def dtype(self) -> str:
        """Return in what servers compute and take adapters: vLLM's LoRA kernels for GPUs refuse float32."""
        return "bfloat16" if self.on_gpu else "float32"

    @property
    def model(self) -> dict[str, Any]:
        """Return what a tiny model needs beyond its seed: as wide as columns of adapters take, and calm in few bits."""
        return {"dtype": self.dtype, "hidden": 512, "head_dim": 64, "std": 0.05} if self.on_gpu else {}

    @property
    def server_flags(self) -> list[str]:
        """Return further flags of a server: its worker is a process of its own, as it is on a CPU."""
        if not self.on_gpu:
            return []
        memory = {"--kv-cache-memory-bytes": _CACHE_BYTES, "--gpu-memory-utilization": 0.1}
        return arguments({"--dtype": self.dtype, "--distributed-executor-backend": "mp", **memory})

    @property
    def learner_flags(self) -> list[str]:
        """Return further flags of the learner, which computes in float32 wherever it is.

        Small updates keep the logits small, and with them what a server's rounding does to logprobs.
        """
        return arguments({"--use_cpu": "false", "--learning_rate": "1e-3"}) if self.on_gpu else []

    @property
    def server_environment(self) -> dict[str, str]:
        """Return the environment of a server."""
        # Where FlashInfer is not installed, vLLM 0.26 looks for its sampler and does not start.
        return {"VLLM_USE_FLASHINFER_SAMPLER": "0", "CUDA_VISIBLE_DEVICES": self.server} if self.on_gpu else {}

    @property
    def learner_environment(self) -> dict[str, str]:
        """Return the environment of the learner."""
        # NCCL takes no two ranks of one host on one GPU. Told that they are on two, it goes through TCP.
        host = {"NCCL_HOSTID": "learner"} if self.shared else {}
        return {"CUDA_VISIBLE_DEVICES": self.learner, **host} if self.on_gpu else {}

    def __str__(self) -> str:
        if not self.on_gpu:
            return "learner and servers on the CPU"
        if self.shared:
            return f"learner and servers share GPU {self.learner}, the only one: NCCL's broadcasts go through TCP"
        return f"learner on GPU {self.learner}, servers on GPU {self.server}"


#: Environment of a server whose engine can be told to fail, see `tests/chaos/inside/sitecustomize.py`.
INSIDE = Path(__file__).parent / "inside"
