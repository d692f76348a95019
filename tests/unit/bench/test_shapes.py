"""The files of a model to measure with."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from bench.common.shapes import SHAPES


def test_every_word_is_one_token(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shape.write(tmp_path / "tiny", "float32"))
    ids = list(range(3, shape.vocab))
    assert tokenizer(" ".join(f"t{i}" for i in ids))["input_ids"] == ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens([0, 1, 2])) == [0, 1, 2]
