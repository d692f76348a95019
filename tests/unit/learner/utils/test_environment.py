"""Environment variables for a while."""

from __future__ import annotations

import os

import pytest

from learner.utils.environment import variables_set


def test_variables_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "old")
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ValueError, match="inside"), variables_set({"THERE": "new", "NOT_THERE": "set"}):
        assert (os.environ["THERE"], os.environ["NOT_THERE"]) == ("new", "set")
        raise ValueError("inside")
    assert os.environ["THERE"] == "old"
    assert "NOT_THERE" not in os.environ
