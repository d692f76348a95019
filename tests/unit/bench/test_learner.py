"""Flags of bench.learner; nothing is trained."""

from __future__ import annotations

from bench.common.models import MAX_POSITION
from bench.learner import CUT, LearnerBench


def test_the_long_load_has_all_rows_but_cut_padding() -> None:
    options = LearnerBench(["--load", "long", "--steps", "2"]).options
    assert set(LearnerBench.row_names) - set(options.only) == {CUT}
    assert options.checkpointing
    assert options.micro_batch == 1
    assert options.steps == 2
    assert options.prompt_tokens + options.tokens < MAX_POSITION
