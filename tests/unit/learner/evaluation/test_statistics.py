"""Wilson's interval against a published example."""

from __future__ import annotations

from learner.evaluation.statistics import wilson_interval


def test_interval_is_wilsons() -> None:
    # Published example: 15 of 148 gives 0.0624 to 0.1605 (Newcombe 1998, method 3: 81 of 263 gives 0.2553 to 0.3662).
    low, high = wilson_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0.0, 128)[0] == 0.0
    assert wilson_interval(1.0, 128)[1] == 1.0
