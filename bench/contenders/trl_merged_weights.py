"""Peer: merged full weights, by TRL's own classes.

The server is started with the command line that `trl vllm-serve` builds. `VLLMGeneration.sync_weights` then does what
`GRPOTrainer(vllm_mode="server")` has it do with a PEFT model: merge, stream every base parameter over NCCL through
vLLM's weight transfer, unmerge, reset the prefix cache.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel

from bench.common.measure import Moved, Setting
from bench.common.servers import ENVIRONMENT, Server, environment, free_port

MERGED = "merged weights (TRL)"


class MergedPath:
    """TRL's `VLLMGeneration` without a trainer."""

    def __init__(self, generation: Any) -> None:
        self.generation = generation

    def push(self, step: int) -> Moved:
        self.generation.sync_weights()
        sizes = [_nbytes(dtype, shape) for _, dtype, shape in self.generation._weight_metadata]
        return Moved(sum(sizes))

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        answer = self.generation.vllm_client.generate([prompt], max_tokens=1, temperature=0.0)
        return answer["completion_ids"][0][0], answer["logprobs"][0][0][0]

    def settle(self) -> None:
        pass


class PeerMerged:
    """The contender TRL 1.16."""

    rows = (MERGED,)
    needs_rank = False
    notes = {  # noqa: RUF012
        MERGED: "every base parameter travels at any rank; TRL does not pause the server, sets no deadline, needs one "
        "NCCL network and an unquantized base, and merging in bfloat16 drifts"
    }

    def __init__(self) -> None:
        self.device = "cpu"
        self._generations: dict[str, Any] = {}

    def unable(self, setting: Setting) -> str | None:
        self.device = setting.device
        if setting.on_cpu or setting.same_gpu:
            return "needs two GPUs"
        return None

    def start(self, setting: Setting, folder: Path, max_rank: int) -> Server:
        from trl.scripts.vllm_serve import ScriptArguments, build_command

        port = free_port()
        arguments = ScriptArguments(model=str(folder), host="127.0.0.1", port=port)
        command = build_command(arguments, ["--served-model-name", "base", *setting.engine_flags])
        env = environment(setting.server_device, {"VLLM_SERVER_DEV_MODE": "1"})
        return Server("vllm serve (TRL)", command, port, setting.work / f"{folder.name}-merged.log", env)

    @contextlib.contextmanager
    def path(self, row: str, server: Server, model: PeftModel) -> Iterator[MergedPath]:
        """One NCCL group per server, whatever the number of ranks measured on it."""
        generation = self._generations.get(server.url)
        if generation is None:
            generation = self._generations[server.url] = self._join(server, model)
        generation.model = model
        generation._weight_metadata = None
        yield MergedPath(generation)

    def _join(self, server: Server, model: PeftModel) -> Any:
        # Read by vLLM's get_ip and by accelerate, both in this process.
        os.environ.setdefault("VLLM_HOST_IP", ENVIRONMENT["VLLM_HOST_IP"])
        os.environ["ACCELERATE_TORCH_DEVICE"] = self.device
        import torch

        torch.cuda.set_device(self.device)
        started = time.perf_counter()
        generation = make_generation(server.url, model)
        print(f"bench: TRL's NCCL group took {time.perf_counter() - started:.1f} s", flush=True)
        return generation


def make_generation(url: str, model: PeftModel) -> Any:
    """What `GRPOTrainer` makes of `vllm_mode="server"`."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(
        model, Accelerator(), processing_class=None, mode="server", server_base_url=url, group_port=free_port()
    )


def _nbytes(dtype: str, shape: list[int]) -> int:
    import torch

    return math.prod(shape) * getattr(torch, dtype).itemsize
