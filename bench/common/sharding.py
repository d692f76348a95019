"""Models sharded over ranks: arguments of GRPOConfig on GPUs, settings on CPUs, where Accelerate shards nothing."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from trl import GRPOTrainer


def fsdp2_on_gpus() -> dict[str, Any]:
    """Return the arguments of GRPOConfig for FSDP2, which shards a rank's GPU."""
    return {"fsdp": True, "fsdp_config": {"version": 2}}


def fsdp2_on_cpu(trainer: GRPOTrainer) -> None:
    """Use FSDP2 with activation checkpointing, where Accelerate would silently use DDP. Call before `attach`."""
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=True
    )
    if trainer.args.bf16:
        state.fsdp_plugin.set_mixed_precision("bf16")
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def zero3_on_gpus() -> dict[str, Any]:
    """Return the arguments of GRPOConfig for ZeRO-3 in bfloat16."""
    return {"deepspeed": _zero3(bf16=True)}


def zero3_on_cpu(*, bf16: bool) -> dict[str, Any]:
    """Use ZeRO-3 on several ranks, where Accelerate would see one; return the arguments of GRPOConfig for it."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    # Use gloo: its own collective for one host would take a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    state = PartialState()
    state.device = torch.device("cpu")
    state.num_processes, state.process_index = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    state.local_process_index = state.process_index
    transformers.training_args.is_torch_bf16_gpu_available = lambda: bf16
    # Shard every parameter, however small.
    return {
        "deepspeed": _zero3(bf16=bf16, stage3_param_persistence_threshold=0),
        "accelerator_config": {"use_configured_state": True},
        "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
    }


def _zero3(*, bf16: bool, **options: Any) -> dict[str, Any]:
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(sizes, "auto"),
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, **options},
    }
