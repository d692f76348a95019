"""The files of a model to measure with."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from bench.common.models import SHAPES, pick_shapes, served_rank


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-0.6b", 0.596), ("qwen3-4b", 4.02), ("qwen3-14b", 14.77), ("tiny", 0.0)]
)
def test_shapes_have_the_sizes_of_their_names(name: str, billions: float) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_shape_is_a_model_directory(tmp_path: Path) -> None:
    [shape] = pick_shapes("tiny")
    shape.write(tmp_path, "float32")
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.head_dim, config.tie_word_embeddings) == (64, 64, True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == shape.vocab
    assert tokenizer("t5 t511")["input_ids"] == [5, 511]


def test_served_rank_is_the_next_that_vllm_has() -> None:
    assert [served_rank(rank) for rank in (1, 8, 9, 128, 129)] == [1, 8, 16, 128, 256]


def test_every_word_is_one_token(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shape.write(tmp_path / "tiny", "float32"))
    ids = list(range(3, shape.vocab))
    assert tokenizer(" ".join(f"t{i}" for i in ids))["input_ids"] == ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens([0, 1, 2])) == [0, 1, 2]
