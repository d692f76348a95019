"""Recipes that `python -m learner.demo` takes: as `learner train` would."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.demo.__main__ import _recipe
from shared.errors import InvalidRequest

NEEDED = "task: reasoning_gym:chain_sum\ndtype: float32\nmax_completion_length: 8\n"


@pytest.mark.parametrize(
    ("written", "arguments"),
    [("", {}), ("task_args: '{\"min_terms\": 2}'", {"min_terms": 2}), ("task_args:\n  min_terms: 2", {"min_terms": 2})],
)
def test_arguments_of_the_task(tmp_path: Path, written: str, arguments: dict[str, int]) -> None:
    (path := tmp_path / "r.yaml").write_text(NEEDED + written)
    assert _recipe(path, None)["task_args"] == arguments
    assert _recipe(path, None)["seed"] == 42
    assert _recipe(path, 7)["seed"] == 7


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("seed: null", "seed: has no value; leave the line out"),
        ("eval_size:", "eval_size: has no value"),
        ("task_args: '[1]'", "task_args must be a JSON object"),
        ("task_args: '{'", "task_args is not valid JSON"),
        ("seed: -1", "seed: "),
    ],
)
def test_values_that_are_refused(tmp_path: Path, written: str, message: str) -> None:
    (path := tmp_path / "r.yaml").write_text(NEEDED + written)
    with pytest.raises(InvalidRequest, match=message) as refused:
        _recipe(path, None)
    assert "\n" not in refused.value.message


def test_a_size_that_may_be_open(tmp_path: Path) -> None:
    (path := tmp_path / "r.yaml").write_text(NEEDED + "train_size: null")
    assert _recipe(path, None)["train_size"] is None
