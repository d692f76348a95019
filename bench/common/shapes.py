"""Models to measure with: real shapes, random weights. Written as a config and a tokenizer, never as weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The ranks that vLLM compiles its LoRA kernels for.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_POSITION = 4096


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
        """What config.json says."""
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
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "attention_bias": False,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "torch_dtype": dtype,
        }

    @property
    def parameters(self) -> int:
        """Weights of the base model, norms aside."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + embeddings

    def write(self, folder: Path, dtype: str) -> Path:
        """A model directory that loads with `--load-format dummy` and `AutoModelForCausalLM.from_config`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(dtype), indent=1))
        write_tokenizer(folder, self.vocab)
        return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer with a word for every id, so that whatever random weights sample has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found within words, too: no word may begin with one.
    special = ("<eos>", "<pad>", "<unk>")
    words = {**{token: i for i, token in enumerate(special)}, **{f"t{i}": i for i in range(len(special), vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=special[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[0],
        pad_token=special[1],
        unk_token=special[2],
        model_max_length=MAX_POSITION,
    )
    fast.save_pretrained(folder)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 2, 4, 2, 64, 128, vocab=512),
        Shape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072),
        Shape("qwen3-1.7b", 2048, 28, 16, 8, 128, 6144),
        Shape("qwen3-4b", 2560, 36, 32, 8, 128, 9728),
        Shape("qwen3-14b", 5120, 40, 40, 8, 128, 17408, tied=False),
    )
}


def pick_shapes(names: str) -> list[Shape]:
    """Shapes of a comma-separated list.

    Raises:
        ValueError: a name that is not one of `SHAPES`.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in SHAPES]
    if unknown or not asked:
        raise ValueError(f"unknown shape {', '.join(unknown) or repr(names)}; there are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in asked]


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that serves `rank`.

    Raises:
        ValueError: vLLM serves no adapter of this rank.
    """
    for served in SERVED_RANKS:
        if rank <= served:
            return served
    raise ValueError(f"rank {rank} is above {SERVED_RANKS[-1]}, the highest that vLLM serves")
