"""Peer: merged full weights, by TRL's own classes.

The server is started with the command line that `trl vllm-serve` builds. `VLLMGeneration.sync_weights` then does what
`GRPOTrainer(vllm_mode="server")` has it do with a PEFT model: merge, stream every base parameter over NCCL through
vLLM's weight transfer, unmerge, reset the prefix cache. One thing is mended, by `send_copies`: as published, what lies
in the last gigabyte is sent without the adapter, which is all of a small model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bench.common.harness import Skip
from bench.common.report import timed
from bench.common.servers import ENVIRONMENT, SAME_GPU, Server, Setting, environment
from bench.contenders import Contender, Moved, SyncPath
from learner.utils.ports import free_port

MERGED = "merged weights (TRL)"


class MergedPath(SyncPath):
    """TRL's `VLLMGeneration` without a trainer."""

    def __init__(self, generation: Any) -> None:
        self.generation = generation

    def push(self, step: int) -> Moved:
        self.generation.sync_weights()
        sent = self.generation._weight_metadata
        return Moved(sum(math.prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in sent))

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        answer = self.generation.vllm_client.generate([prompt], max_tokens=1, temperature=0.0)
        return answer["completion_ids"][0][0], answer["logprobs"][0][0][0]


class TrlMergedWeights(Contender):
    """The contender TRL 1.16."""

    rows = (MERGED,)
    needs_rank = False
    notes = {
        MERGED: "every base parameter travels at any rank; TRL does not pause the server, sets no deadline, needs one "
        "NCCL network and an unquantized base, and merging in bfloat16 drifts; as published it sends the last gigabyte "
        "without the adapter, which is mended here"
    }

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._generations: dict[str, Any] = {}

    def start(self, folder: Path, max_rank: int) -> Server:
        from trl.scripts.vllm_serve import ScriptArguments, build_command

        if self.setting.device == "cpu":
            raise Skip("needs two GPUs")
        if self.setting.same_gpu:
            raise Skip(SAME_GPU)
        port = free_port()
        arguments = ScriptArguments(model=str(folder), host="127.0.0.1", port=port)
        command = build_command(arguments, ["--served-model-name", "base", *self.setting.engine_flags])
        env = environment(self.setting.server_device, {"VLLM_SERVER_DEV_MODE": "1"})
        return Server("vllm serve (TRL)", command, port, self.setting.work / f"{folder.name}-merged.log", env)

    @contextlib.contextmanager
    def path(self, row: str, server: Server, model: PeftModel) -> Iterator[MergedPath]:
        """Join one NCCL group per server, however many ranks are measured on it."""
        if server.url not in self._generations:
            # Read by vLLM's get_ip and by accelerate, both in this process.
            os.environ.setdefault("VLLM_HOST_IP", ENVIRONMENT["VLLM_HOST_IP"])
            os.environ["ACCELERATE_TORCH_DEVICE"] = self.setting.device
            torch.cuda.set_device(self.setting.device)
            self._generations[server.url], seconds = timed(lambda: make_generation(server.url, model))
            print(f"bench: TRL's NCCL group took {seconds:.1f} s", flush=True)
        generation = self._generations[server.url]
        generation.model = model
        generation._weight_metadata = None
        yield MergedPath(generation)


def make_generation(url: str, model: PeftModel) -> Any:
    """Return what `GRPOTrainer` makes of `vllm_mode="server"`."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    generation = VLLMGeneration(
        model, Accelerator(), processing_class=None, mode="server", server_base_url=url, group_port=free_port()
    )
    send_copies(generation)
    return generation


def send_copies(generation: Any) -> None:
    """Let TRL's `VLLMGeneration` send the weights that it has merged.

    vLLM gathers views of a gigabyte before it reads them (`pack_tensors`), and after the last one TRL has unmerged the
    adapter already (`_iter_named_params`): what is read then is the base.
    """
    merged = generation._iter_named_params

    def copies() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in merged():
            yield name, weight.clone()

    generation._iter_named_params = copies
