"""What an answer is worth: numbers and tags in completions, and the rewards that compare them."""

from __future__ import annotations

import pytest

from learner.tasks import TaskError
from learner.tasks.answer_parsing import last_number, tagged, whole
from learner.tasks.rewards import exact_match, math_answer
from tests.support.chats import said


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", "7"),
        ("1 - 9 = -8", "-8"),
        ("It is 9-8", "8"),
        ("so \N{MINUS SIGN}3", "-3"),
        ("1,2,3", "3"),
        ("1,234,567 people", "1234567"),
        ("about 3.50 euros", "3.50"),
        ("none", None),
        ("-", None),
        ("(2)-1", "1"),
        ("so .5", "0.5"),
        ("$.50", "0.50"),
        ("-.25", "-0.25"),
        ("1 and...5", "5"),
        ("see Sec.5", "5"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_other_extractors() -> None:
    assert tagged("<answer>1</answer> no: <answer> 2\n3 </answer>") == "2\n3"
    assert tagged("<answer>unfinished") is None
    assert (whole("  a b \n"), whole("  ")) == ("a b", None)


def test_math_answer() -> None:
    gold = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"
    completions = said("It is 1072.", "\\boxed{1072} of 5", "#### 1,072", "1073", "no idea", "$\\frac{2144}{2}$")
    assert math_answer([], completions, answer=[gold] * 6) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert math_answer([], ["x = 1/2"], solution=["$\\frac{1}{2}$"]) == [1.0]
    assert math_answer([], ["3"], answer=["no number at all"]) == [None]
    with pytest.raises(TaskError, match="the dataset has gold"):
        math_answer([], ["3"], gold=["3"], trainer_state=None)


def test_exact_match() -> None:
    assert exact_match([], said(" Paris\n", "paris"), answer=["Paris", "Paris"]) == [1.0, 0.0]
    assert exact_match([], ["7"], answer=[7]) == [1.0]
    assert exact_match([], ["None", ""], answer=[None, None]) == [None, None]
    with pytest.raises(TaskError, match="needs a column 'answer'"):
        exact_match([], ["7"])
