"""Models to measure with, real shapes with random weights, and the learner's side: an adapter, an optimizer step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from shared.weights import served_rank as served_rank

MAX_POSITION = 8192
#: vLLM's dummy weights are below 0.001, those of its norms too: smaller adapters would not show in its answers.
SCALE = 0.3


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense Qwen3."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 151936
    tied: bool = True

    def config(self, dtype: str) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": MAX_POSITION,
            "rope_theta": 1000000,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "torch_dtype": dtype,
        }

    @property
    def parameters(self) -> int:
        """Number of weights of the base model, without norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + embeddings

    @property
    def kv_bytes(self) -> int:
        """Bytes that the key-value cache holds of a token, at two bytes a number."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    def write(self, folder: Path, dtype: str) -> Path:
        """Write a directory that loads with `--load-format dummy` and `AutoModelForCausalLM.from_config`; return it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(dtype), indent=1))
        self.tokenizer().save_pretrained(folder)
        return folder

    def tokenizer(self) -> Any:
        """Return a tokenizer with a word for every id, so that every token that random weights sample has a text."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # Special tokens are found within words, too: no word may begin with one.
        special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        words = [*special.values(), *(f"t{i}" for i in range(len(special), self.vocab))]
        model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=MAX_POSITION, **special)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 2, 4, 2, 64, 128, vocab=512),
        Shape("smollm2-135m", 576, 30, 9, 3, 64, 1536, vocab=49152),
        Shape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072),
        Shape("qwen3-1.7b", 2048, 28, 16, 8, 128, 6144),
        Shape("qwen3-4b", 2560, 36, 32, 8, 128, 9728),
        Shape("qwen3-14b", 5120, 40, 40, 8, 128, 17408, tied=False),
    )
}


def pick_shapes(names: str) -> list[Shape]:
    """Return the shapes of a comma-separated list.

    Raises:
        ValueError: a name that is not one of `SHAPES`.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in SHAPES]
    if unknown or not asked:
        raise ValueError(f"unknown shape {', '.join(unknown) or repr(names)}; there are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in asked]


class Policy:
    """A base model with random weights on the learner's device; adapters are put on it and taken off again."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            self.base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.base.requires_grad_(False)

    @contextlib.contextmanager
    def adapter(self, rank: int, adapter_dtype: str) -> Iterator[PeftModel]:
        """Yield the base with a fresh adapter on all linear layers."""
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.base, config)
        for parameter in trained(model):
            parameter.data = parameter.data.to(getattr(torch, adapter_dtype))
        optimizer_step(model)
        try:
            yield model
        finally:
            self.base = model.unload()
            if hasattr(self.base, "peft_config"):
                del self.base.peft_config


def trained(model: PeftModel) -> list[torch.nn.Parameter]:
    """Return the adapter's parameters."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


@torch.no_grad()
def optimizer_step(model: PeftModel, std: float = SCALE) -> None:
    """Change every LoRA weight in place and wait until that is done."""
    parameters = trained(model)
    for parameter in parameters:
        parameter.normal_(std=std)
    wait_for(parameters[0].device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib() -> dict[str, float]:
    """Return the most GiB of tensors so far, and that PyTorch's allocator held for them; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    most = {"allocated_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: nbytes / 2**30 for name, nbytes in most.items()}


def write_weights(policy: Policy, shape: Shape, folder: Path, dtype: str) -> None:
    """Write the learner's base for the servers: logprobs of two different models could not be compared."""
    policy.base.save_pretrained(folder)
    shape.write(folder, dtype)  # its config.json may be of another version of transformers
    (folder / "generation_config.json").unlink(missing_ok=True)
