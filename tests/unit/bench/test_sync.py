from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from bench.common import measure as measuring
from bench.common.background_load import Record, compare, tokens_within
from bench.common.choices import pick_rows
from bench.common.measure import Moved, fresh_prompts, measure
from bench.common.shapes import SHAPES, pick_shapes, served_rank
from bench.sync import __main__ as sync
from bench.sync.run import ROWS


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--shapes", "qwen3-5b"], "unknown shape qwen3-5b"),
        (["--shapes", ""], "unknown shape"),
        (["--ranks", "1024"], "rank 1024 is above 512"),
        (["--only", "theirs"], "unknown row 'theirs'"),
        (["--parallel-start"], "--share-server"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sync.main(flags)
    assert word in capsys.readouterr().err


def test_rows_are_picked_by_their_beginnings() -> None:
    assert pick_rows(None, ROWS) == list(ROWS)
    assert pick_rows("lockstep", ROWS) == ["lockstep http", "lockstep collective", "lockstep collective, keep"]
    assert pick_rows("merged, lockstep http", ROWS) == ["lockstep http", "merged weights (TRL)"]


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


def test_tokens_are_spread_over_the_time_of_their_request() -> None:
    records = [Record(0.0, 2.0, 64), Record(2.0, 4.0, 64)]
    assert tokens_within(records, 1.0, 3.0) == pytest.approx(64)
    assert tokens_within(records, 5.0, 6.0) == 0
    windows = list(pairwise([0.0, 2.0, 4.0]))
    assert compare(records, windows, 1)["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


class FakePath:
    """Answers with the number of pushes, or always the same."""

    def __init__(self, deaf: bool = False) -> None:
        self.deaf, self.pushes, self.settled = deaf, 0, 0

    def push(self, step: int) -> Moved:
        self.pushes += 1
        assert step == self.pushes
        return Moved(10, {"install": 0.5})

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        return (0 if self.deaf else self.pushes), -1.0

    def settle(self) -> None:
        self.settled += 1


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(measuring, "optimizer_step", lambda model: None)
    return None


def test_a_row_counts_what_comes_after_the_warm_up(no_model: Any) -> None:
    path = FakePath()
    figures = measure(path, no_model, 4, vocab=100)
    assert path.pushes == path.settled == measuring.WARM_UP + 4
    assert figures["n"] == 4
    assert figures["bytes"] == 10
    assert figures["parts_median_s"] == {"install": 0.5}
    assert figures["push_s"]["median"] <= figures["first_token_s"]["median"]


def test_pushes_without_effect_are_an_error(no_model: Any) -> None:
    with pytest.raises(RuntimeError, match="no effect"):
        measure(FakePath(deaf=True), no_model, 4, vocab=100)


def test_prompts_are_fresh() -> None:
    prompts = fresh_prompts(1000)
    assert len({tuple(next(prompts)) for _ in range(50)}) == 50
