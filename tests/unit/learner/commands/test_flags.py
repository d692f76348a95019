from __future__ import annotations

import pytest
from transformers.hf_argparser import string_to_bool

from learner.commands.flags import is_true


@pytest.mark.parametrize("text", ["true", "True", "t", "yes", "y", "1", "false", "no", "n", "f", "0"])
def test_words_for_true_are_those_of_training(text: str) -> None:
    assert is_true({"use_cpu": text}, "use_cpu") is string_to_bool(text)


def test_a_flag_without_a_value_is_true_and_one_not_given_is_not() -> None:
    assert is_true({"use_cpu": ""}, "use_cpu")
    assert is_true({"use_cpu": True}, "use_cpu")
    assert not is_true({}, "use_cpu")
