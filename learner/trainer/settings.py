"""What a training's state depends on: settings that must be the same when it goes on, by the names of the flags.

The adapter's scale and layers, the base below it, the order of the prompts, their arrangement in batches, and what the
optimizer's state was made by. All others (steps, saving, logging, servers, sampling, rewards, learning rate and its
schedule) may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from learner.adapters.stored import WEIGHTS_FILE
from learner.config import LearnerConfig
from learner.tasks.columns import IMAGE_COLUMNS, image_key, message_parts, row_images

#: Fields of LoraConfig -> our names. Of `target_modules` and the like, the layers that they select are compared.
_LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "lora_modules_to_save",
    "use_dora": "use_dora",
    "bias": "lora_bias",
}
_ORDER = ("seed", "shuffle_dataset", "num_generations", "num_iterations")
_BATCHES = ("generation_batch_size", "steps_per_generation", "gradient_accumulation_steps")
_OPTIMIZER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate")
#: Prompts that are hashed, evenly spaced where there are more.
_PROMPTS_HASHED = 20_000
#: And rows whose images are.
_IMAGES_HASHED = 256


def settings_before(
    args: GRPOConfig, lora: LoraConfig, config: LearnerConfig, base_weights: str | None
) -> dict[str, Any]:
    """Return the settings that are known before a model is loaded. `base_weights`: fingerprint, None if unknown."""
    settings = {ours: getattr(lora, name, None) for name, ours in _LORA.items()}
    settings |= {name: getattr(args, name) for name in (*_ORDER, *_BATCHES, *_OPTIMIZER)}
    settings["optim"] = str(getattr(args.optim, "value", args.optim)).removesuffix("_fused")  # the same state
    settings["num_processes"] = args.world_size
    if base_weights:
        settings["model_name_or_path"] = f"weights {base_weights[:16]}"
    if config.task:  # under `learner train`; a script has no names for these
        settings["task"] = Path(config.task).name if Path(config.task).is_file() else config.task
        settings["task_args"] = config.task_args
        settings["environment"] = config.environment
        settings["init_adapter"] = _digest_of_adapter(config.init_adapter) if config.init_adapter else None
    return _as_json(settings)


def settings_of(
    trainer: GRPOTrainer,
    lora: LoraConfig,
    layers: Collection[str],
    config: LearnerConfig,
    base_weights: str | None,
) -> dict[str, Any]:
    """Return all settings. `lora`, `layers`: of the trainer's model, the names of its adapted layers."""
    settings = settings_before(trainer.args, lora, config, base_weights)
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    settings["lora_target_modules"] = f"{' '.join(kinds)} ({len(layers)} layers, {_digest(sorted(layers))})"
    sharded = {"fsdp": trainer.is_fsdp_enabled, "deepspeed": trainer.is_deepspeed_enabled}
    settings["sharding"] = next((kind for kind, enabled in sharded.items() if enabled), "none")
    if isinstance(trainer.train_dataset, Dataset) and "prompt" in trainer.train_dataset.column_names:
        settings["train_dataset"] = _digest_of_prompts(trainer.train_dataset)
    return _as_json(settings)


def _digest_of_prompts(dataset: Dataset) -> str:
    stride = -(-len(dataset) // _PROMPTS_HASHED) or 1
    rows = dataset.select(range(0, len(dataset), stride))
    prompts = (batch["prompt"] for batch in rows.select_columns("prompt").iter(1000))
    # Fewer of their images: each is decoded.
    few = dataset.select(range(0, len(dataset), -(-len(dataset) // _IMAGES_HASHED) or 1))
    few = few.select_columns([name for name in ("prompt", *IMAGE_COLUMNS) if name in dataset.column_names])
    images = ([i, *map(image_key, own)] for i, row in enumerate(few) if (own := _images(row)))
    return f"{len(dataset)} prompts ({_digest(chain(prompts, images))})"


def _images(row: Mapping[str, Any]) -> list[Any]:
    parts = (part.get("image") for part in message_parts(row["prompt"]))
    return [*row_images(row), *(image for image in parts if image is not None)]


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def _digest_of_adapter(folder: str) -> str:
    """Return what tells adapters apart, wherever they have been moved to; the name of one on the hub."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return folder
    with path.open("rb") as file:
        return f"weights {hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()}"


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the values as they come back from JSON; sets, whose order varies, as sorted lists."""
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
